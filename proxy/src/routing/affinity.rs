//! Which endpoint a session belongs to, without remembering sessions.
//!
//! Rendezvous hashing: every endpoint gets a score from (session, endpoint), the highest wins. Losing an endpoint moves its
//! own sessions and no others, a new one takes 1/N of them from everybody; there is no ring to build, no virtual nodes to
//! tune, and all proxies that share a key agree without talking. It costs one multiplication per endpoint and pick: the
//! filters look at every endpoint anyway.
//!
//! The load bound: an endpoint at its bound (see [`LoadBound`]) is passed over for the next highest score, so that one busy
//! session, or many that hash alike, cannot bury an engine. The session comes back when there is room.
//!
//! What clients send is never hashed without the secret key: who does not know it cannot make sessions collide.

#![allow(
    deprecated,
    reason = "std's keyed SipHash; DefaultHasher, named as its replacement, has a fixed key"
)]

use std::{
    fmt,
    hash::{Hasher, SipHasher},
};

use http::{HeaderMap, header::COOKIE};
use serde::Serialize;
use sha2::{Digest, Sha256};

use super::{load::FULL_WEIGHT, policy::View};

/// The secret of every hash that routing takes of what a client sent.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct HashKey(u64, u64);

impl fmt::Debug for HashKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("HashKey(..)")
    }
}

impl HashKey {
    /// A key of one's own.
    pub fn random(rng: &mut fastrand::Rng) -> Self {
        Self(rng.u64(..), rng.u64(..))
    }

    /// The same for all who have the same secret.
    pub fn from_secret(secret: &str) -> Self {
        let digest = Sha256::digest(secret.as_bytes());
        let word = |at: usize| {
            digest.iter().skip(at).take(8).fold(0, |word: u64, byte| (word << 8) | u64::from(*byte))
        };
        Self(word(0), word(8))
    }

    /// SipHash-2-4 under this key.
    pub fn hasher(self) -> SipHasher {
        SipHasher::new_with_keys(self.0, self.1)
    }

    /// The hash of `bytes`.
    pub fn hash(self, bytes: &[u8]) -> u64 {
        let mut hasher = self.hasher();
        hasher.write(bytes);
        hasher.finish()
    }

    /// The name of an engine process in hashes: a new process under an old id has an empty cache and is another one.
    pub fn endpoint(self, id: &str, generation: u64) -> u64 {
        let mut hasher = self.hasher();
        hasher.write(id.as_bytes());
        hasher.write(&generation.to_le_bytes());
        hasher.finish()
    }

    /// Which session a request belongs to: the text of `header`, else of the cookie, else the body's `user`; the first
    /// that is there and not empty. An empty name looks for nothing.
    pub fn session(
        self,
        headers: &HeaderMap,
        header: &str,
        cookie: &str,
        user: Option<&[u8]>,
    ) -> Option<u64> {
        let named = (!header.is_empty()).then(|| headers.get(header)).flatten().map(|value| value.as_bytes());
        let text = named
            .filter(|value| !value.is_empty())
            .or_else(|| cookie_value(headers, cookie))
            .or_else(|| user.filter(|user| !user.is_empty() && *user != b"\"\""))?;
        Some(self.hash(text))
    }
}

fn cookie_value<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a [u8]> {
    if name.is_empty() {
        return None;
    }
    let pairs = headers.get_all(COOKIE).into_iter().flat_map(|value| value.as_bytes().split(|b| *b == b';'));
    let mut values =
        pairs.filter_map(|pair| pair.trim_ascii().strip_prefix(name.as_bytes())?.strip_prefix(b"="));
    values.find(|value| !value.is_empty())
}

/// How much busier than the average an endpoint may get for affinity's sake.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct LoadBound {
    /// Of the average load, the request at hand included, in percent; at least 100.
    pub percent: u32,
    /// Requests that are never too many. Without it one request would be too many in a pool that is nearly idle.
    pub floor: u32,
}

impl LoadBound {
    /// The largest load, the request at hand included, for a full-grown endpoint among `views`.
    pub fn limit(self, views: &[View]) -> u64 {
        let total: u64 = views.iter().map(|view| u64::from(view.load)).sum::<u64>() + 1;
        let endpoints = u64::try_from(views.len()).unwrap_or(u64::MAX).max(1);
        let average = (total * u64::from(self.percent.max(100))).div_ceil(100 * endpoints);
        average.max(u64::from(self.floor))
    }

    /// Whether `view` may take one request more under `limit`, of which a young endpoint has its weight's share.
    pub fn admits(limit: u64, view: &View) -> bool {
        let share = (limit * u64::from(view.weight) / u64::from(FULL_WEIGHT)).max(1);
        u64::from(view.load) < share
    }
}

/// The endpoint of `session`: the highest score of all, and of those that the bound admits (`None`: it admits nobody).
pub(super) fn rendezvous(session: u64, views: &[View], bound: LoadBound) -> (Option<usize>, Option<usize>) {
    let limit = bound.limit(views);
    let scored = |admitted: bool| {
        let fitting =
            views.iter().enumerate().filter(move |(_, view)| !admitted || LoadBound::admits(limit, view));
        fitting.max_by_key(|(_, view)| mix(session, view.key)).map(|(index, _)| index)
    };
    (scored(false), scored(true))
}

/// Both are hashes under the secret key; this spreads every bit of either over all (the finaliser of `SplitMix64`).
pub(super) fn mix(session: u64, endpoint: u64) -> u64 {
    let mut bits = session ^ endpoint.rotate_left(32).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^ (bits >> 31)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const KEY: HashKey = HashKey(1, 2);
    const LOOSE: LoadBound = LoadBound { percent: 100_000, floor: 1_000 };

    fn views(n: usize) -> Vec<View> {
        (0..n).map(|i| View { key: KEY.endpoint(&format!("e{i}"), 1), ..View::default() }).collect()
    }

    fn owners(sessions: u64, views: &[View]) -> Vec<u64> {
        let owner = |s: u64| rendezvous(KEY.hash(&s.to_le_bytes()), views, LOOSE).1.expect("admitted");
        (0..sessions).map(|s| views[owner(s)].key).collect()
    }

    #[test]
    fn a_lost_endpoint_moves_its_own_sessions_and_no_others() {
        let (all, mut fewer) = (views(10), views(10));
        let lost = fewer.remove(3).key;
        let (before, after) = (owners(10_000, &all), owners(10_000, &fewer));
        let moved = before.iter().zip(&after).filter(|(b, a)| b != a).count();
        assert!(before.iter().zip(&after).all(|(b, a)| b == a || *b == lost));
        assert!((850..1_150).contains(&moved), "{moved} of 10000 moved, a tenth expected");
    }

    #[test]
    fn a_new_endpoint_takes_its_share_from_everybody() {
        let (before, after) = (owners(10_000, &views(9)), owners(10_000, &views(10)));
        let new = views(10)[9].key;
        assert!(before.iter().zip(&after).all(|(b, a)| b == a || *a == new));
        let moved = before.iter().zip(&after).filter(|(b, a)| b != a).count();
        assert!((850..1_150).contains(&moved), "{moved} of 10000 moved, a tenth expected");
    }

    #[test]
    fn sessions_spread_evenly() {
        let all = views(8);
        let owners = owners(16_000, &all);
        for view in &all {
            let share = owners.iter().filter(|key| **key == view.key).count();
            assert!((1_800..2_200).contains(&share), "{share} of 16000 over 8");
        }
    }

    #[test]
    fn a_session_is_named_by_header_then_cookie_then_user() {
        let mut headers = HeaderMap::new();
        let session = |headers: &HeaderMap, user| KEY.session(headers, "x-session-affinity", "sid", user);
        assert_eq!(session(&headers, None), None);
        assert_eq!(session(&headers, Some(b"\"\"")), None, "an empty user is nobody");
        assert_eq!(session(&headers, Some(b"\"u\"")), Some(KEY.hash(b"\"u\"")));
        headers.append(COOKIE, "a=b; asid=no; sid=cookie".parse().unwrap());
        assert_eq!(session(&headers, Some(b"\"u\"")), Some(KEY.hash(b"cookie")));
        headers.append("x-session-affinity", "header".parse().unwrap());
        assert_eq!(session(&headers, None), Some(KEY.hash(b"header")));
        assert_eq!(KEY.session(&headers, "", "", None), None, "empty names look for nothing");
    }

    #[test]
    fn hashes_depend_on_the_secret_and_on_the_generation() {
        let (one, other) = (HashKey::from_secret("one"), HashKey::from_secret("other"));
        assert_eq!(one, HashKey::from_secret("one"));
        assert_ne!(one.hash(b"x"), other.hash(b"x"));
        assert_ne!(one.endpoint("e", 1), one.endpoint("e", 2));
        assert_eq!(format!("{one:?}"), "HashKey(..)", "a secret is not for logs");
    }

    proptest! {
        #[test]
        fn the_bound_is_never_exceeded_and_admits_somebody(
            loads in prop::collection::vec(0u32..50, 1..20), session in any::<u64>(),
            percent in 100u32..300, floor in 0u32..8,
        ) {
            let mut views = views(loads.len());
            for (view, load) in views.iter_mut().zip(&loads) { view.load = *load; }
            let bound = LoadBound { percent, floor };
            let (_, chosen) = rendezvous(session, &views, bound);
            let chosen = chosen.expect("some endpoint is at or below the average");
            let total = loads.iter().sum::<u32>() + 1;
            let limit = (f64::from(total) * f64::from(percent) / 100.0 / loads.len() as f64).ceil();
            prop_assert!(f64::from(loads[chosen] + 1) <= limit.max(f64::from(floor)));
        }
    }
}
