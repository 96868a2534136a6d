//! What an operator can graph.
