//! The store on etcd: shared by every control plane, and by its own replicas as durable as a majority of them.
//!
//! The contract is [`Store`]'s, which is etcd's own; [`convert`] maps it, [`link`] finds a member that answers, [`watch`]
//! bridges broken connections, [`failure`] says what is wrong. Reads are linearizable. A listing is read in pages, all
//! at the revision of the first.
//!
//! # A store that went back
//!
//! etcd that lost its data, or was restored from an older backup, starts again at a lower revision. Nothing in it
//! announces that: a watch for the next revision just waits. So every linearizable answer is compared with the highest
//! revision that was known when the question was asked; one that is lower means that this is not the history we
//! followed. From then on this store refuses everything ([`StoreError::Rewound`]), in words, until the process is
//! started anew: an empty store must not become an empty fleet by itself. Views stay as they were, so proxies and
//! agents go on with what they have; and what a new process publishes has an older version, which they refuse.
//! The operator restores a backup, or starts the control planes anew to accept the store as it is (docs/ha.md).

mod convert;
mod failure;
mod link;
pub mod members;
mod watch;

use std::{
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use etcd_client::{GetOptions, ResponseHeader, SortOrder, SortTarget, TxnOpResponse};
use penstock_config::controlplane::StoreConfig;
use tokio_util::sync::CancellationToken;

use super::{Entry, LeaseId, Listing, Revision, Store, StoreError, Txn, TxnOutcome, Watch, Write, keys};
use convert::{Prefix, number, signed, unmet};
use link::{Link, Repeat};

/// Keys of one page of a listing.
const PAGE: usize = 500;
/// Largest answer that is accepted: a page of the largest values.
const MAX_MESSAGE_BYTES: usize = 1 << 30;

/// See the module's text.
pub struct EtcdStore {
    inner: Arc<Inner>,
}

struct Inner {
    link: Arc<Link>,
    prefix: Prefix,
    /// The highest revision that a linearizable answer had.
    highest: AtomicU64,
    /// Why nothing more is served: the store went back.
    rewound: OnceLock<String>,
    closed: CancellationToken,
    member_timeout: Duration,
}

impl EtcdStore {
    /// Does not connect yet: a control plane starts before, after or without its etcd.
    pub fn new(settings: StoreConfig) -> Self {
        let closed = CancellationToken::new();
        let (prefix, member_timeout) =
            (Prefix(settings.prefix.clone()), Duration::from_millis(settings.member_timeout_ms));
        let link = Link::new(settings, closed.clone());
        let (highest, rewound) = (AtomicU64::new(0), OnceLock::new());
        Self { inner: Arc::new(Inner { link, prefix, highest, rewound, closed, member_timeout }) }
    }
}

impl Inner {
    /// What every operation asks first. Returns the highest revision known now.
    fn check(&self) -> Result<Revision, StoreError> {
        if self.closed.is_cancelled() {
            return Err(StoreError::Unavailable("it was closed".into()));
        }
        match self.rewound.get() {
            Some(reason) => Err(StoreError::Rewound(reason.clone())),
            None => Ok(self.highest.load(Ordering::Acquire)),
        }
    }

    /// Takes note of a linearizable answer's revision; `known` was known before the question.
    fn heard(&self, known: Revision, header: Option<&ResponseHeader>) -> Result<Revision, StoreError> {
        let revision = number(header.map_or(0, ResponseHeader::revision));
        if revision < known {
            let reason = format!(
                "etcd is at revision {revision} and was at {known}: its data was lost or replaced by an older copy"
            );
            if self.rewound.set(reason.clone()).is_ok() {
                tracing::error!(
                    reason,
                    "the store is refused until this process is started anew; see docs/ha.md"
                );
            }
            return Err(StoreError::Rewound(reason));
        }
        self.highest.fetch_max(revision, Ordering::AcqRel);
        Ok(revision)
    }

    /// Makes sure that this is still the store that was followed so far.
    async fn witness(&self) -> Result<(), StoreError> {
        let known = self.check()?;
        let key = self.prefix.full(keys::SCHEMA);
        let response = self
            .link
            .ask(Repeat::Harmless, 0, |client| {
                let (mut client, key) = (client.kv_client(), key.clone());
                async move { client.get(key, Some(GetOptions::new().with_count_only())).await }
            })
            .await?;
        self.heard(known, response.header()).map(drop)
    }

    /// One page from `from` on, at `revision` (0: now).
    async fn page(
        &self,
        from: &str,
        end: &[u8],
        revision: Revision,
    ) -> Result<(Vec<Entry>, Revision, bool), StoreError> {
        let known = self.check()?;
        let response =
            self.link
                .ask(Repeat::Harmless, 0, |client| {
                    let options = GetOptions::new()
                        .with_range(end.to_vec())
                        .with_revision(signed(revision))
                        .with_sort(SortTarget::Key, SortOrder::Ascend)
                        .with_limit(i64::try_from(PAGE).unwrap_or(i64::MAX));
                    let (client, from) = (client.kv_client(), from.to_owned());
                    async move {
                        client.max_decoding_message_size(MAX_MESSAGE_BYTES).get(from, Some(options)).await
                    }
                })
                .await?;
        let at = self.heard(known, response.header())?;
        let entries = response.kvs().iter().filter_map(|kv| self.prefix.entry(kv)).collect();
        Ok((entries, at, response.more()))
    }

    async fn whole(&self, prefix: &str) -> Result<Listing, StoreError> {
        let start = self.prefix.full(prefix);
        let end = range_end(start.as_bytes());
        let (mut entries, revision, mut more) = self.page(&start, &end, 0).await?;
        while more {
            let Some(last) = entries.last() else { break };
            // The smallest key after it.
            let from = format!("{}\0", self.prefix.full(&last.key));
            let (page, _, further) = self.page(&from, &end, revision).await?;
            entries.extend(page);
            more = further;
        }
        Ok(Listing { entries, revision })
    }
}

/// The first key after every key with `prefix`, as etcd counts; `\0` alone means without end.
fn range_end(prefix: &[u8]) -> Vec<u8> {
    let mut end = prefix.to_vec();
    while let Some(last) = end.pop() {
        if last < u8::MAX {
            end.push(last + 1);
            return end;
        }
    }
    vec![0]
}

#[async_trait]
impl Store for EtcdStore {
    fn kind(&self) -> &'static str {
        "etcd"
    }

    async fn get(&self, key: &str) -> Result<Option<Entry>, StoreError> {
        let inner = &self.inner;
        let known = inner.check()?;
        let full = inner.prefix.full(key);
        let response = inner
            .link
            .ask(Repeat::Harmless, 0, |client| {
                let full = full.clone();
                async move {
                    client.kv_client().max_decoding_message_size(MAX_MESSAGE_BYTES).get(full, None).await
                }
            })
            .await?;
        inner.heard(known, response.header())?;
        Ok(response.kvs().first().and_then(|kv| inner.prefix.entry(kv)))
    }

    async fn list(&self, prefix: &str) -> Result<Listing, StoreError> {
        // Compacted between two pages: read anew. A store that is compacted faster than it can be read is not ours.
        let mut listing = self.inner.whole(prefix).await;
        for _ in 0..3 {
            match &listing {
                Err(StoreError::Invalid(reason)) if reason.contains("compacted") => {
                    listing = self.inner.whole(prefix).await;
                }
                _ => break,
            }
        }
        listing
    }

    async fn txn(&self, txn: Txn) -> Result<TxnOutcome, StoreError> {
        let inner = &self.inner;
        let known = inner.check()?;
        inner.prefix.check(&txn)?;
        let leases = txn.writes.iter().filter_map(|write| match write {
            Write::Put { lease, .. } if *lease != 0 => Some(*lease),
            Write::Put { .. } | Write::Delete { .. } => None,
        });
        let lease = leases.min().unwrap_or(0);
        let request = inner.prefix.transaction(&txn);
        let response =
            inner
                .link
                .ask(Repeat::OnlyIfUnsent, lease, |client| {
                    let request = request.clone();
                    async move {
                        client.kv_client().max_decoding_message_size(MAX_MESSAGE_BYTES).txn(request).await
                    }
                })
                .await?;
        let revision = inner.heard(known, response.header())?;
        if response.succeeded() {
            return Ok(TxnOutcome::Committed { revision });
        }
        let looks = response.op_responses();
        let seen: Vec<Option<Entry>> = looks
            .iter()
            .map(|look| match look {
                TxnOpResponse::Get(get) => get.kvs().first().and_then(|kv| inner.prefix.entry(kv)),
                _ => None,
            })
            .collect();
        let failed = unmet(&txn, &seen).ok_or_else(|| {
            StoreError::Invalid("etcd found a condition unmet that holds; nothing was written".into())
        })?;
        Ok(TxnOutcome::Conflict { failed, revision })
    }

    async fn watch(&self, prefix: &str, from: Revision) -> Result<Watch, StoreError> {
        self.inner.check()?;
        Ok(watch::open(self.inner.clone(), prefix, from))
    }

    /// etcd counts leases in whole seconds, and has a shortest one (2 s as it comes): a lease may last longer than asked.
    async fn lease_grant(&self, ttl: Duration) -> Result<LeaseId, StoreError> {
        self.inner.check()?;
        let seconds = i64::try_from(ttl.as_millis().div_ceil(1_000)).unwrap_or(i64::MAX);
        // One that was granted without our knowing ends by itself.
        let granted = self
            .inner
            .link
            .ask(
                Repeat::Harmless,
                0,
                |client| async move { client.lease_client().grant(seconds, None).await },
            )
            .await?;
        Ok(number(granted.id()))
    }

    async fn lease_keep_alive(&self, lease: LeaseId) -> Result<(), StoreError> {
        self.inner.check()?;
        self.inner
            .link
            .ask(Repeat::Harmless, lease, |client| async move {
                client.lease_client().keep_alive(signed(lease)).await.map(drop)
            })
            .await
    }

    async fn lease_revoke(&self, lease: LeaseId) -> Result<(), StoreError> {
        self.inner.check()?;
        self.inner
            .link
            .ask(Repeat::Harmless, lease, |client| async move {
                client.lease_client().revoke(signed(lease)).await.map(drop)
            })
            .await
    }

    /// Never: etcd comes back, and this process finds it again.
    async fn failed(&self) -> StoreError {
        std::future::pending().await
    }

    async fn close(&self) {
        self.inner.closed.cancel();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_ends_where_the_next_begins() {
        assert_eq!(range_end(b"/nodes/"), b"/nodes0");
        assert_eq!(range_end(b"a\xff"), b"b");
        assert_eq!(range_end(b""), [0]);
    }
}
