//! Own vectors.
