//! Tests of policy as a whole.
