//! Work that takes longer than a message may stay hidden.
