//! Faults on demand: what the campaign of fault injection breaks in a process that it cannot break from outside.
//!
//! Compiled in by the feature `fault-injection` alone, which no release has; without it every call here is empty and is
//! compiled to nothing. Two kinds:
//!
//! - [`point`]: a named place, before or after something that must not be torn apart, where the process can be made to
//!   die, to panic or to stand still. `WRITE_API_FAULTS` says what happens where;
//! - [`planted`]: a named mistake, made on purpose, which the campaign has to catch. `WRITE_API_PLANTED_BUG` names the one
//!   that is made.

/// A place where a fault can be ordered; `key` tells one event, message or run from others there.
#[inline]
pub fn point(name: &str, key: &str) {
    #[cfg(feature = "fault-injection")]
    enabled::point(name, key);
    #[cfg(not(feature = "fault-injection"))]
    let _ = (name, key);
}

/// Whether this mistake is to be made.
#[inline]
pub fn planted(name: &str) -> bool {
    #[cfg(feature = "fault-injection")]
    return enabled::planted(name);
    #[cfg(not(feature = "fault-injection"))]
    {
        let _ = name;
        false
    }
}

#[cfg(feature = "fault-injection")]
mod enabled {
    use std::sync::LazyLock;
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::time::Duration;

    static ORDERS: LazyLock<Vec<Order>> = LazyLock::new(|| {
        let text = std::env::var("WRITE_API_FAULTS").unwrap_or_default();
        parse(&text).unwrap_or_else(|problem| panic!("WRITE_API_FAULTS: {problem}"))
    });

    static BUG: LazyLock<Option<String>> = LazyLock::new(|| std::env::var("WRITE_API_PLANTED_BUG").ok());

    /// What is to happen at one point.
    #[derive(Debug)]
    struct Order {
        point: String,
        /// Only for this key; `None` for all.
        key: Option<String>,
        fault: Fault,
        /// At this passing of the point; `None` at each.
        at: Option<u32>,
        passed: AtomicU32,
    }

    #[derive(Debug, PartialEq, Eq)]
    enum Fault {
        /// As by `kill -9`.
        Kill,
        Panic,
        /// The thread stands still.
        Stall(Duration),
    }

    /// `point=fault`, separated by commas; `point[key]=fault` for one key; `fault@3` at the third passing only. A fault is
    /// `kill`, `panic` or `stall:MILLISECONDS`.
    fn parse(text: &str) -> Result<Vec<Order>, String> {
        let orders = text.split(',').filter(|order| !order.is_empty());
        orders.map(|order| parse_order(order).ok_or_else(|| format!("{order:?} is no order"))).collect()
    }

    fn parse_order(text: &str) -> Option<Order> {
        let (place, what) = text.rsplit_once('=')?;
        let (point, key) = match place.strip_suffix(']') {
            Some(place) => place.split_once('[').map(|(point, key)| (point, Some(key.to_owned())))?,
            None if place.contains('[') => return None,
            None => (place, None),
        };
        let (fault, at) = match what.split_once('@') {
            Some((fault, at)) => (fault, Some(at.parse().ok()?)),
            None => (what, None),
        };
        let fault = match fault.split_once(':') {
            Some(("stall", milliseconds)) => Fault::Stall(Duration::from_millis(milliseconds.parse().ok()?)),
            None if fault == "kill" => Fault::Kill,
            None if fault == "panic" => Fault::Panic,
            _ => return None,
        };
        Some(Order { point: point.to_owned(), key, fault, at, passed: AtomicU32::new(0) })
    }

    pub fn point(name: &str, key: &str) {
        for order in ORDERS.iter() {
            if order.point != name || order.key.as_ref().is_some_and(|wanted| wanted != key) {
                continue;
            }
            let passing = order.passed.fetch_add(1, Ordering::Relaxed) + 1;
            if order.at.is_none_or(|at| at == passing) {
                act(&order.fault, name, key);
            }
        }
    }

    fn act(fault: &Fault, name: &str, key: &str) {
        // Past the log and its buffers: the line must be out before the process is gone.
        eprintln!("{{\"level\":\"INFO\",\"message\":\"fault injected\",\"point\":{name:?},\"key\":{key:?}}}");
        match fault {
            Fault::Kill => {
                // SAFETY: raise touches no memory.
                unsafe { libc::raise(libc::SIGKILL) };
            }
            Fault::Panic => panic!("ordered at {name}"),
            Fault::Stall(time) => std::thread::sleep(*time),
        }
    }

    pub fn planted(name: &str) -> bool {
        BUG.as_deref() == Some(name)
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn orders_are_read() {
            let orders = parse("a.before=kill@3,b[id=1]=panic,c=stall:50").expect("good orders");
            let shown: Vec<_> = orders.iter().map(|o| (o.point.as_str(), o.key.as_deref(), &o.fault, o.at)).collect();
            assert_eq!(
                shown,
                [
                    ("a.before", None, &Fault::Kill, Some(3)),
                    ("b", Some("id=1"), &Fault::Panic, None),
                    ("c", None, &Fault::Stall(Duration::from_millis(50)), None),
                ]
            );
            for wrong in ["a", "a=die", "a=kill@x", "a=stall:", "a[b=kill"] {
                assert!(parse(wrong).is_err(), "{wrong}");
            }
        }
    }
}
