//! How many requests of each token there were in the last minute. Pure: the time is an argument.
//!
//! Requests are counted by the second, and a second counts until all of it is a minute ago: in no minute, wherever it
//! begins, does a token get more than its limit. Memory is one small queue per token that was used in the last minute;
//! only tokens that exist are asked about, so their number is bounded.

use std::{
    collections::{HashMap, VecDeque},
    time::Duration,
};

/// Seconds for which a request counts: a minute, and the second that it began in.
const WINDOW_S: u64 = 61;

/// See the module's text.
#[derive(Debug, Default)]
pub struct Limiter {
    used: HashMap<String, Used>,
    swept_s: u64,
}

/// Requests by second, the oldest first.
#[derive(Debug, Default)]
struct Used {
    seconds: VecDeque<(u64, u32)>,
    sum: u32,
}

impl Used {
    fn forget(&mut self, now_s: u64) {
        while let Some((second, count)) = self.seconds.front().copied() {
            if second + WINDOW_S > now_s {
                break;
            }
            self.sum -= count;
            self.seconds.pop_front();
        }
    }
}

impl Limiter {
    /// Counts a request of `who` at `now` (since any fixed moment), unless it would be one too many: then nothing is
    /// counted, and the answer is in how many seconds, from 1, there is room again. A limit of 0 is none.
    ///
    /// # Errors
    /// The seconds.
    pub fn take(&mut self, who: &str, limit: u32, now: Duration) -> Result<(), u64> {
        if limit == 0 {
            return Ok(());
        }
        let now_s = now.as_secs();
        if now_s >= self.swept_s + WINDOW_S {
            self.used.values_mut().for_each(|used| used.forget(now_s));
            self.used.retain(|_, used| used.sum > 0);
            self.swept_s = now_s;
        }
        let used = match self.used.get_mut(who) {
            Some(used) => used,
            None => self.used.entry(who.to_owned()).or_default(),
        };
        used.forget(now_s);
        if used.sum >= limit {
            let oldest = used.seconds.front().map_or(now_s, |(second, _)| *second);
            return Err((oldest + WINDOW_S).saturating_sub(now_s).max(1));
        }
        used.sum += 1;
        match used.seconds.back_mut() {
            Some((second, count)) if *second == now_s => *count += 1,
            _ => used.seconds.push_back((now_s, 1)),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_token_has_its_own_count_and_learns_when_to_come_back() {
        let mut limiter = Limiter::default();
        let at = Duration::from_secs;
        assert_eq!(limiter.take("a", 2, at(100)), Ok(()));
        assert_eq!(limiter.take("a", 2, at(130)), Ok(()));
        assert_eq!(limiter.take("a", 2, at(131)), Err(30));
        assert_eq!(limiter.take("b", 2, at(131)), Ok(()));
        assert_eq!(limiter.take("a", 2, at(160)), Err(1));
        assert_eq!(limiter.take("a", 2, at(161)), Ok(()), "what was refused was not counted");
        assert_eq!(limiter.take("a", 0, at(161)), Ok(()), "no limit");
    }

    #[test]
    fn tokens_that_are_used_no_more_are_forgotten() {
        let mut limiter = Limiter::default();
        for n in 0..100 {
            limiter.take(&n.to_string(), 5, Duration::from_secs(1)).expect("room");
        }
        limiter.take("late", 5, Duration::from_secs(200)).expect("room");
        assert_eq!(limiter.used.len(), 1);
    }

    proptest! {
        #[test]
        fn no_minute_has_more_than_the_limit(gaps in prop::collection::vec(0_u64..9_000, 1..400), limit in 1_u32..20) {
            let (mut limiter, mut now, mut taken) = (Limiter::default(), 0, Vec::new());
            for gap in gaps {
                now += gap;
                if limiter.take("t", limit, Duration::from_millis(now)).is_ok() {
                    taken.push(now);
                }
            }
            for start in &taken {
                let within = taken.iter().filter(|at| (*start..*start + 60_000).contains(at)).count();
                prop_assert!(within <= limit as usize);
            }
        }
    }
}
