//! The low-water mark: which listing ids are all terminal.

use std::collections::VecDeque;

use crate::fault;

/// Which page a row belongs to; pages are numbered from 0 as they are read.
pub(super) type PageNumber = u64;

/// Pages that were read and not yet committed as a whole, the oldest first.
#[derive(Debug)]
pub(super) struct Progress {
    cursor: i64,
    first: PageNumber,
    open: VecDeque<OpenPage>,
}

#[derive(Debug)]
struct OpenPage {
    last_listing_id: i64,
    rows_left: usize,
}

impl Progress {
    /// Nothing read yet; every listing up to `cursor` is terminal.
    pub(super) fn new(cursor: i64) -> Self {
        Progress { cursor, first: 0, open: VecDeque::new() }
    }

    /// Notes that a page of `rows` rows was read, ending with `last_listing_id`.
    pub(super) fn page_read(&mut self, rows: usize, last_listing_id: i64) -> PageNumber {
        debug_assert!(rows > 0, "an empty page is the end of the set");
        self.open.push_back(OpenPage { last_listing_id, rows_left: rows });
        self.first + self.open.len() as u64 - 1
    }

    /// Notes that one row of a page becomes terminal with the next commit.
    pub(super) fn row_done(&mut self, page: PageNumber) {
        let index = usize::try_from(page - self.first).expect("few pages are open");
        self.open[index].rows_left -= 1;
    }

    /// The cursor to commit together with the rows noted so far.
    pub(super) fn cursor(&mut self) -> i64 {
        if fault::planted("cursor-ahead") {
            return self.open.back().map_or(self.cursor, |page| page.last_listing_id);
        }
        while let Some(page) = self.open.front().filter(|page| page.rows_left == 0) {
            self.cursor = page.last_listing_id;
            self.first += 1;
            self.open.pop_front();
        }
        self.cursor
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cursor_never_passes_an_open_row() {
        let mut progress = Progress::new(5);
        let first = progress.page_read(2, 20);
        let second = progress.page_read(1, 30);
        let third = progress.page_read(1, 40);
        assert_eq!(progress.cursor(), 5);
        progress.row_done(second);
        progress.row_done(first);
        assert_eq!(progress.cursor(), 5, "one row of the first page is open");
        progress.row_done(first);
        assert_eq!(progress.cursor(), 30);
        progress.row_done(third);
        assert_eq!(progress.cursor(), 40);
        let fourth = progress.page_read(1, 50);
        progress.row_done(fourth);
        assert_eq!(progress.cursor(), 50);
    }
}
