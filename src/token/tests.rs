//! What holds for the module as a whole.
