//! Heap profiles of the running service, read with Go's own tools.
