//! The program: parses the command line, dispatches, turns errors into exit codes.

fn main() {}
