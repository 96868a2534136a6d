//! The allocator's own dump of what it sampled, as text (`heap_v2`).
//!
//! A line `@ 0x…` with the return addresses of a stack, the innermost first, is followed by one for all threads together,
//! `t*: OBJECTS: BYTES [OBJECTS: BYTES]`, live and in brackets all that ever were, and by one for each thread.
//!
//! Only one block in many is sampled, a large one more likely than a small one. From the average size of the blocks of a stack
//! follows how likely one was, and so how many there really were. That formula is jeprof's, and the
//! allocator writes its numbers so that this very formula gives back what it knows.

use std::io::BufRead;

use anyhow::{Context as _, bail, ensure};

/// Blocks and their bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Amount {
    pub objects: u64,
    pub bytes: u64,
}

/// A stack with what was allocated there, estimated from the samples.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Stack {
    /// Return addresses, the innermost first.
    pub addresses: Vec<usize>,
    /// Not freed yet.
    pub live: Amount,
    /// Ever allocated; 0 unless the allocator counts that (`prof_accum`).
    pub total: Amount,
}

/// Reads a dump and hands each of its stacks to `each`; gives the average distance of two samples in bytes.
pub(super) fn read(dump: impl BufRead, mut each: impl FnMut(&Stack)) -> anyhow::Result<u64> {
    let mut lines = dump.lines();
    let first = lines.next().context("the allocator's dump is empty")?.context("reading the allocator's dump")?;
    let period: u64 = first
        .strip_prefix("heap_v2/")
        .and_then(|period| period.parse().ok())
        .filter(|period| *period > 0)
        .with_context(|| format!("the allocator's dump begins with {first:?}, not with heap_v2/DISTANCE"))?;
    let mut stack = Stack::default();
    // Before the first stack come the sums of all of them.
    let mut open = false;
    for line in lines {
        let line = line.context("reading the allocator's dump")?;
        let line = line.trim();
        if let Some(addresses) = line.strip_prefix('@') {
            ensure!(!open, "the allocator's dump has a stack without numbers before {line:?}");
            stack.addresses.clear();
            for address in addresses.split_ascii_whitespace() {
                let digits = address.strip_prefix("0x").unwrap_or(address);
                let address = usize::from_str_radix(digits, 16);
                stack.addresses.push(address.with_context(|| format!("no address in the allocator's dump: {line:?}"))?);
            }
            open = true;
        } else if let Some(numbers) = line.strip_prefix("t*:").filter(|_| open) {
            let [live, total] =
                amounts(numbers).with_context(|| format!("no numbers in the allocator's dump: {line:?}"))?;
            (stack.live, stack.total) = (unbiased(live, period), unbiased(total, period));
            open = false;
            each(&stack);
        } else if line == "MAPPED_LIBRARIES:" {
            break;
        }
    }
    if open {
        bail!("the allocator's dump ends in the middle of a stack");
    }
    Ok(period)
}

/// `1: 2 [3: 4]`
fn amounts(text: &str) -> Option<[Amount; 2]> {
    let (live, total) = text.split_once('[')?;
    let (total, _) = total.split_once(']')?;
    let amount = |text: &str| {
        let (objects, bytes) = text.split_once(':')?;
        Some(Amount { objects: objects.trim().parse().ok()?, bytes: bytes.trim().parse().ok()? })
    };
    Some([amount(live)?, amount(total)?])
}

/// How much there really was of what was sampled.
fn unbiased(sampled: Amount, period: u64) -> Amount {
    let Amount { objects, bytes } = sampled;
    if objects == 0 || bytes == 0 {
        return Amount::default();
    }
    let average = bytes as f64 / objects as f64;
    // 1 - e^-x, also for blocks so small that e^-x is nearly 1.
    let likely = -(-average / period as f64).exp_m1();
    Amount { objects: (objects as f64 / likely).round() as u64, bytes: (bytes as f64 / likely).round() as u64 }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn stacks(dump: &str) -> anyhow::Result<(u64, Vec<Stack>)> {
        let mut all = Vec::new();
        let period = read(dump.as_bytes(), |stack| {
            all.push(Stack { addresses: stack.addresses.clone(), live: stack.live, total: stack.total });
        })?;
        Ok((period, all))
    }

    #[test]
    fn a_dump_is_read() {
        let (period, all) = stacks(
            "heap_v2/524288\n  t*: 3: 6291456 [4: 8388608]\n  t1: 3: 6291456 [4: 8388608] worker\n\
             @ 0x55d0 0xAB 0x1003\n  t*: 3: 62914560 [40: 838860800]\n  t1: 3: 62914560 [40: 838860800]\n\
             @ 0x1\n  t*: 0: 0 [1: 64]\n  t2: 0: 0 [1: 64]\n\nMAPPED_LIBRARIES:\n@ 0x2\n",
        )
        .unwrap();
        assert_eq!(period, 524_288);
        assert_eq!(all.len(), 2, "{all:?}");
        assert_eq!(all[0].addresses, [0x55d0, 0xab, 0x1003]);
        // Twenty megabytes at once are sampled for certain.
        assert_eq!(all[0].live, Amount { objects: 3, bytes: 62_914_560 });
        assert_eq!(all[0].total, Amount { objects: 40, bytes: 838_860_800 });
        assert_eq!(all[1].live, Amount::default(), "nothing live, and no division by zero");
        // One block of 64 bytes stands for the half megabyte between two samples.
        assert_eq!(all[1].total.bytes, 524_320);
        assert_eq!(all[1].total.objects, 8193);
    }

    #[test]
    fn what_is_no_dump_is_refused_with_a_reason() {
        for (dump, reason) in [
            ("", "is empty"),
            ("heap_v1/524288\n", "begins with"),
            ("heap_v2/0\n", "begins with"),
            ("heap_v2/x\n", "begins with"),
            ("heap_v2/1\n@ 0xzz\n", "no address"),
            ("heap_v2/1\n@ 0x1\n@ 0x2\n", "without numbers"),
            ("heap_v2/1\n@ 0x1\n", "in the middle"),
            ("heap_v2/1\n@ 0x1\n t*: 1: 2\n", "no numbers"),
            ("heap_v2/1\n@ 0x1\n t*: 1: 2 [3]\n", "no numbers"),
        ] {
            let told = format!("{:#}", stacks(dump).unwrap_err());
            assert!(told.contains(reason), "{dump:?}: {told}");
        }
    }

    proptest! {
        /// What the allocator writes for a number of blocks of one size comes back as that number.
        #[test]
        fn the_formula_undoes_the_allocators(objects in 1..1_000_000_u64, size in 8..100_000_000_u64) {
            let period = 524_288;
            let likely = 1.0 - (-(size as f64) / period as f64).exp();
            let written = Amount { objects: (objects as f64 * likely).round() as u64, bytes: (objects as f64 * size as f64 * likely).round() as u64 };
            prop_assume!(written.objects > 100);
            let read = unbiased(written, period);
            let close = |a: u64, b: f64| (a as f64 - b).abs() <= b * 0.03;
            prop_assert!(close(read.objects, objects as f64) && close(read.bytes, objects as f64 * size as f64), "{read:?}");
        }

        #[test]
        fn any_text_is_a_dump_or_an_error(text in "(heap_v2/9\n)?([@ ]|0x1|t\\*:|: |\\[|\\]|\n|[0-9]{1,25})*") {
            let _ = stacks(&text);
        }
    }
}
