//! What a proxy was told to do wrong, and what of it really happened.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

/// The same calls in the same order meet the same faults.
const SEED: u64 = 17_000;

/// Something that a proxy can be told to do wrong.
pub(crate) trait Fault: Clone + PartialEq {
    /// Its name in counts: lower case, words joined by `-`.
    fn name(&self) -> &'static str;
}

/// One fault that happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hit {
    /// The fault's name.
    pub fault: &'static str,
    /// When it happened.
    pub at: SystemTime,
    /// The call or the statement that it hit.
    pub what: String,
}

/// How often an ordered fault happens.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Amount {
    /// To so many more.
    Times(u64),
    /// To this ratio of all, 0 to 1.
    Ratio(f64),
    /// To all until then.
    Until(Instant),
}

#[derive(Debug)]
struct Standing<F> {
    fault: F,
    amount: Amount,
}

/// A fault that was taken for one call, to be [counted](Orders::hit) or [given back](Orders::restore).
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Taken<F> {
    pub(crate) fault: F,
    /// When the order ends, if it ends by time.
    pub(crate) until: Option<Instant>,
}

#[derive(Debug)]
struct Book<F> {
    standing: Vec<Standing<F>>,
    hits: BTreeMap<String, u64>,
    log: Vec<Hit>,
    dice: fastrand::Rng,
}

impl<F: PartialEq> Book<F> {
    /// How often the fault is still to happen, where it was ordered so.
    fn times_left(&mut self, fault: &F) -> Option<&mut u64> {
        self.standing.iter_mut().filter(|standing| standing.fault == *fault).find_map(|standing| {
            match &mut standing.amount {
                Amount::Times(left) => Some(left),
                Amount::Ratio(_) | Amount::Until(_) => None,
            }
        })
    }
}

/// The orders of one proxy, shared by its connections.
#[derive(Debug)]
pub(crate) struct Orders<F>(Mutex<Book<F>>);

impl<F: Fault> Orders<F> {
    pub(crate) fn new() -> Self {
        let dice = fastrand::Rng::with_seed(SEED);
        Self(Mutex::new(Book { standing: Vec::new(), hits: BTreeMap::new(), log: Vec::new(), dice }))
    }

    /// The fault happens to the next `times` that it fits, in addition to those ordered before.
    pub(crate) fn order(&self, fault: F, times: u64) {
        let mut book = self.book();
        match book.times_left(&fault) {
            Some(left) => *left = left.saturating_add(times),
            None => book.standing.push(Standing { fault, amount: Amount::Times(times) }),
        }
    }

    /// The fault happens to this ratio, 0 to 1, of all that it fits. A ratio set before is replaced; 0 ends it.
    pub(crate) fn set_ratio(&self, fault: F, ratio: f64) {
        assert!((0.0..=1.0).contains(&ratio), "the ratio of {} is {ratio}: it must be from 0 to 1", fault.name());
        let mut book = self.book();
        let is_same = |standing: &Standing<F>| standing.fault == fault && matches!(standing.amount, Amount::Ratio(_));
        book.standing.retain(|standing| !is_same(standing));
        if ratio > 0.0 {
            book.standing.push(Standing { fault, amount: Amount::Ratio(ratio) });
        }
    }

    /// The fault happens to all that it fits for `time` from now.
    pub(crate) fn hold(&self, fault: F, time: Duration) {
        let now = Instant::now();
        let mut book = self.book();
        book.standing.retain(|standing| !matches!(standing.amount, Amount::Until(end) if end <= now));
        book.standing.push(Standing { fault, amount: Amount::Until(now + time) });
    }

    /// Ends all orders. The counts stay.
    pub(crate) fn clear(&self) {
        self.book().standing.clear();
    }

    /// The oldest order that `fits` and whose turn it is.
    pub(crate) fn take(&self, fits: impl Fn(&F) -> bool) -> Option<Taken<F>> {
        let mut book = self.book();
        let Book { standing, dice, .. } = &mut *book;
        let now = Instant::now();
        // Those that are used up stay: the last one may be given back.
        standing.iter_mut().filter(|standing| fits(&standing.fault)).find_map(|standing| {
            let (is_due, until) = match &mut standing.amount {
                Amount::Times(left) => {
                    let is_due = *left > 0;
                    *left = left.saturating_sub(1);
                    (is_due, None)
                }
                Amount::Until(end) => (*end > now, Some(*end)),
                Amount::Ratio(ratio) => (dice.f64() < *ratio, None),
            };
            is_due.then(|| Taken { fault: standing.fault.clone(), until })
        })
    }

    /// A fault that was taken could not happen: it happens to a later one instead.
    pub(crate) fn restore(&self, taken: &Taken<F>) {
        let mut book = self.book();
        // What goes by time or by chance is not used up by being taken.
        if let Some(left) = book.times_left(&taken.fault) {
            *left = left.saturating_add(1);
        }
    }

    /// A fault has happened, to `what`.
    pub(crate) fn hit(&self, fault: &F, what: impl Into<String>) {
        let mut book = self.book();
        *book.hits.entry(fault.name().to_owned()).or_default() += 1;
        book.log.push(Hit { fault: fault.name(), at: SystemTime::now(), what: what.into() });
    }

    /// How often each fault has happened, by name.
    pub(crate) fn hits(&self) -> BTreeMap<String, u64> {
        self.book().hits.clone()
    }

    /// All that has happened, oldest first.
    pub(crate) fn log(&self) -> Vec<Hit> {
        self.book().log.clone()
    }

    fn book(&self) -> MutexGuard<'_, Book<F>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone, Debug, PartialEq)]
    enum Wrong {
        Late,
        Lost,
    }

    impl Fault for Wrong {
        fn name(&self) -> &'static str {
            match self {
                Self::Late => "late",
                Self::Lost => "lost",
            }
        }
    }

    fn taken(orders: &Orders<Wrong>, wrong: &Wrong, of: usize) -> usize {
        (0..of).filter(|_| orders.take(|fault| fault == wrong).is_some()).count()
    }

    #[test]
    fn an_order_is_for_so_many_and_one_that_did_not_happen_is_still_to_come() {
        let orders = Orders::new();
        orders.order(Wrong::Lost, 2);
        assert_eq!(taken(&orders, &Wrong::Late, 5), 0);
        let first = orders.take(|_| true).expect("it was ordered");
        orders.restore(&first);
        assert_eq!(taken(&orders, &Wrong::Lost, 5), 2);
        // The last one of an order can be given back, too.
        orders.restore(&first);
        assert_eq!(taken(&orders, &Wrong::Lost, 5), 1);
        orders.order(Wrong::Lost, u64::MAX);
        orders.clear();
        assert_eq!(taken(&orders, &Wrong::Lost, 5), 0);
    }

    #[test]
    fn a_ratio_is_kept_and_replaced() {
        let orders = Orders::new();
        orders.set_ratio(Wrong::Lost, 0.1);
        let some = taken(&orders, &Wrong::Lost, 10_000);
        assert!((800..1_200).contains(&some), "{some}");
        orders.set_ratio(Wrong::Lost, 0.0);
        assert_eq!(taken(&orders, &Wrong::Lost, 1_000), 0);
    }

    #[test]
    fn what_is_held_ends_by_itself() {
        let orders = Orders::new();
        orders.hold(Wrong::Late, Duration::from_millis(50));
        assert!(orders.take(|_| true).is_some_and(|taken| taken.until.is_some()));
        std::thread::sleep(Duration::from_millis(60));
        assert_eq!(orders.take(|_| true), None);
    }

    #[test]
    fn only_what_happened_is_counted() {
        let orders = Orders::new();
        orders.order(Wrong::Lost, 2);
        let _ = orders.take(|_| true);
        orders.hit(&Wrong::Lost, "the second");
        assert_eq!(orders.hits(), BTreeMap::from([("lost".to_owned(), 1)]));
        assert_eq!(orders.log()[0].what, "the second");
    }
}
