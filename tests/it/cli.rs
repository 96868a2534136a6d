//! The command line: exit codes, errors that say what to do, nothing secret in any output.
