//! An endpoint table as it was accepted, and how the next one is read over it.
//!
//! A table comes whole, however little of it has changed: ten thousand endpoints are a megabyte. So each endpoint keeps the
//! bytes it was read from, and one whose bytes come again is shared with the table before: it is neither decoded nor checked
//! nor copied, and `Arc::ptr_eq` tells everybody behind that it is the same. What is left of the work per endpoint is one
//! comparison of some eighty bytes.
//!
//! Reading follows the former table in its order, in which the next one nearly always comes. Endpoints that were put in or taken
//! out cost one look-up by id each, in a map that is made when the first is met.

use std::{
    collections::{HashMap, HashSet},
    ops::Deref,
    sync::Arc,
};

use bytes::Bytes;
use penstock_proto::v1;
use prost::Message;

use super::check_address;

/// One endpoint of an accepted table.
#[derive(Debug, Default)]
pub struct Told {
    /// As it came.
    raw: Bytes,
    endpoint: v1::Endpoint,
}

impl Deref for Told {
    type Target = v1::Endpoint;

    fn deref(&self) -> &v1::Endpoint {
        &self.endpoint
    }
}

impl PartialEq for Told {
    fn eq(&self, other: &Self) -> bool {
        self.raw == other.raw
    }
}

/// An accepted table: ids are unique, addresses are `host:port`, and each is ready or drains.
#[derive(Debug, Clone, Default)]
pub struct Table {
    /// Its name.
    pub pool: String,
    /// In the order in which they came.
    pub endpoints: Vec<Arc<Told>>,
    /// Whether the pool may sleep: an engine comes for a request that waits.
    pub wakes: bool,
    /// Engines that have left it and are about to be stopped. Advice: nothing in it is wrong enough to refuse a table.
    pub departing: Vec<v1::Departing>,
}

impl PartialEq for Table {
    fn eq(&self, other: &Self) -> bool {
        let same = |(one, other): (&Arc<Told>, &Arc<Told>)| Arc::ptr_eq(one, other) || one == other;
        (&self.pool, self.wakes, &self.departing) == (&other.pool, other.wakes, &other.departing)
            && self.endpoints.len() == other.endpoints.len()
            && self.endpoints.iter().zip(&other.endpoints).all(same)
    }
}

/// [`v1::EndpointTable`] with its endpoints unread: on the wire they are the same.
#[derive(Clone, PartialEq, Message)]
struct Unread {
    #[prost(string, tag = "1")]
    pool: String,
    #[prost(bytes = "bytes", repeated, tag = "2")]
    endpoints: Vec<Bytes>,
    #[prost(bool, tag = "3")]
    wakes: bool,
    #[prost(message, repeated, tag = "4")]
    departing: Vec<v1::Departing>,
}

impl Table {
    /// As [`v1::EndpointTable`] would be written.
    pub(in crate::xds) fn encode(&self) -> Vec<u8> {
        let endpoints = self.endpoints.iter().map(|told| told.raw.clone()).collect();
        let (pool, departing) = (self.pool.clone(), self.departing.clone());
        Unread { pool, endpoints, wakes: self.wakes, departing }.encode_to_vec()
    }

    /// Reads the table `name`, sharing with `before` what is the same. What is wrong with it goes to `reasons`.
    ///
    /// # Errors
    /// It is no such message.
    pub(super) fn read(
        name: &str,
        bytes: &[u8],
        before: Option<&Self>,
        reasons: &mut Vec<String>,
    ) -> Result<Self, prost::DecodeError> {
        // Copied once as a whole; the endpoints are slices of the copy.
        let unread = Unread::decode(Bytes::copy_from_slice(bytes))?;
        let mut endpoints = Vec::with_capacity(unread.endpoints.len());
        let mut reader = Reader::new(before);
        for (index, raw) in unread.endpoints.iter().enumerate() {
            let (endpoint, new) = reader.read(raw)?;
            if new {
                check(name, index, &endpoint, reasons);
            }
            endpoints.push(endpoint);
        }
        check_unique(name, &endpoints, reasons);
        Ok(Self { pool: unread.pool, endpoints, wakes: unread.wakes, departing: unread.departing })
    }
}

/// Goes through the former table beside the next one.
struct Reader<'a> {
    before: &'a [Arc<Told>],
    /// Where the next one is expected.
    at: usize,
    /// Made when the order is left for the first time.
    by_id: Option<HashMap<&'a str, usize>>,
}

impl<'a> Reader<'a> {
    fn new(before: Option<&'a Table>) -> Self {
        Self { before: before.map_or(&[], |table| &table.endpoints), at: 0, by_id: None }
    }

    /// The endpoint of these bytes, and whether it was read anew.
    fn read(&mut self, raw: &[u8]) -> Result<(Arc<Told>, bool), prost::DecodeError> {
        if let Some(same) = self.before.get(self.at).filter(|told| told.raw == raw) {
            self.at += 1;
            return Ok((Arc::clone(same), false));
        }
        let endpoint = v1::Endpoint::decode(raw)?;
        if let Some(index) = self.find(&endpoint.id) {
            self.at = index + 1;
            if let Some(same) = self.before.get(index).filter(|told| told.raw == raw) {
                return Ok((Arc::clone(same), false));
            }
        }
        // A copy of its own: a slice would keep all of the message.
        Ok((Arc::new(Told { raw: Bytes::copy_from_slice(raw), endpoint }), true))
    }

    /// Where the former table has the id.
    fn find(&mut self, id: &str) -> Option<usize> {
        let before = self.before;
        if before.get(self.at).is_some_and(|told| told.id == id) {
            return Some(self.at);
        }
        let by_id = self.by_id.get_or_insert_with(|| {
            before.iter().enumerate().map(|(index, told)| (told.id.as_str(), index)).collect()
        });
        by_id.get(id).copied()
    }
}

fn check(name: &str, index: usize, endpoint: &Told, reasons: &mut Vec<String>) {
    let id = &endpoint.id;
    if id.is_empty() {
        reasons.push(format!("table {name:?}: endpoint number {index} has no id"));
    }
    if let Err(reason) = check_address(&endpoint.address) {
        reasons.push(format!("table {name:?}: endpoint {id:?}: {reason}"));
    }
    match v1::EndpointState::try_from(endpoint.state) {
        Ok(v1::EndpointState::Ready | v1::EndpointState::Draining) => {}
        Ok(v1::EndpointState::Unspecified) | Err(_) => reasons.push(format!(
            "table {name:?}: endpoint {id:?}: state {} is not READY (1) or DRAINING (2)",
            endpoint.state
        )),
    }
}

/// In the order of their ids, as they come, this is a look at neighbours.
fn check_unique(name: &str, endpoints: &[Arc<Told>], reasons: &mut Vec<String>) {
    if endpoints.is_sorted_by(|one, next| one.id < next.id) {
        return;
    }
    let mut ids = HashSet::with_capacity(endpoints.len());
    for endpoint in endpoints {
        let id = endpoint.id.as_str();
        if !id.is_empty() && !ids.insert(id) {
            reasons.push(format!("table {name:?}: endpoint id {id:?} is there twice"));
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn endpoint(id: u16, generation: u64) -> v1::Endpoint {
        v1::Endpoint {
            id: format!("e-{id}"),
            address: "127.0.0.1:1".into(),
            generation,
            state: v1::EndpointState::Ready.into(),
            ..Default::default()
        }
    }

    fn wire(endpoints: &[v1::Endpoint]) -> Vec<u8> {
        let departing = v1::Departing {
            id: "e-99".into(),
            generation: 3,
            departure: Some(v1::Departure { move_after_ms: Some(5), fenced: false }),
        };
        v1::EndpointTable {
            pool: "p".into(),
            endpoints: endpoints.to_vec(),
            wakes: true,
            departing: vec![departing],
        }
        .encode_to_vec()
    }

    fn read(endpoints: &[v1::Endpoint], before: Option<&Table>) -> (Table, Vec<String>) {
        let mut reasons = Vec::new();
        let table = Table::read("p", &wire(endpoints), before, &mut reasons).expect("a table");
        (table, reasons)
    }

    fn shared(one: &Table, other: &Table) -> usize {
        let there = |told: &&Arc<Told>| other.endpoints.iter().any(|other| Arc::ptr_eq(told, other));
        one.endpoints.iter().filter(there).count()
    }

    #[test]
    fn only_what_changed_is_read_anew() {
        let all: Vec<_> = (0..100).map(|id| endpoint(id, 1)).collect();
        let (before, _) = read(&all, None);
        let (same, _) = read(&all, Some(&before));
        assert_eq!((shared(&before, &same), before == same), (100, true));
        let mut one = all.clone();
        one[50].generation = 2;
        assert_eq!(shared(&before, &read(&one, Some(&before)).0), 99);
        let fewer: Vec<_> = all.iter().filter(|endpoint| endpoint.id.ends_with('7')).cloned().collect();
        assert_eq!(shared(&before, &read(&fewer, Some(&before)).0), 10);
        let mut turned = all;
        turned.reverse();
        turned.insert(3, endpoint(999, 1));
        assert_eq!(shared(&before, &read(&turned, Some(&before)).0), 100);
    }

    #[test]
    fn an_endpoint_that_is_there_twice_is_noticed_though_each_was_accepted_before() {
        let (before, _) = read(&[endpoint(1, 1), endpoint(2, 1)], None);
        let twice = [endpoint(1, 1), endpoint(2, 1), endpoint(1, 1)];
        assert_eq!(read(&twice, Some(&before)).1, [r#"table "p": endpoint id "e-1" is there twice"#]);
    }

    #[test]
    fn a_message_that_is_cut_is_refused_wherever_it_is_cut() {
        let whole = wire(&[endpoint(1, 1), endpoint(2, 1)]);
        let (before, _) = read(&[endpoint(1, 1), endpoint(2, 1)], None);
        for end in 0..whole.len() {
            let ours = Table::read("p", &whole[..end], Some(&before), &mut Vec::new());
            let theirs = v1::EndpointTable::decode(&whole[..end]);
            assert_eq!(ours.is_ok(), theirs.is_ok(), "{end}");
        }
    }

    fn tables() -> impl Strategy<Value = Vec<v1::Endpoint>> {
        prop::collection::vec(
            (0u16..12, 0u64..3).prop_map(|(id, generation)| endpoint(id, generation)),
            0..12,
        )
    }

    proptest! {
        #[test]
        fn whatever_was_before_a_table_reads_as_it_was_written(one in tables(), next in tables()) {
            let (before, _) = read(&one, None);
            let ((table, reasons), (alone, alone_reasons)) = (read(&next, Some(&before)), read(&next, None));
            let told: Vec<v1::Endpoint> = table.endpoints.iter().map(|told| (***told).clone()).collect();
            prop_assert_eq!(&told, &next);
            prop_assert_eq!(reasons, alone_reasons);
            prop_assert_eq!(table.encode(), wire(&next));
            prop_assert!(table == alone);
        }

        #[test]
        fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            let (before, _) = read(&[endpoint(1, 1)], None);
            let ours = Table::read("p", &bytes, Some(&before), &mut Vec::new());
            prop_assert_eq!(ours.is_ok(), v1::EndpointTable::decode(bytes.as_slice()).is_ok());
        }
    }
}
