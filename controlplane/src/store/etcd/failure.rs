//! What went wrong at one etcd member, in a word that decides what happens next and a sentence for the operator. Pure.

use etcd_client::Error;
use tonic::{Code, Status};

use crate::store::{LeaseId, StoreError};

/// What becomes of an operation that failed at one member.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It surely did nothing; another member may do better.
    Elsewhere,
    /// It may have taken place. What is idempotent goes to another member.
    Unknown,
    /// Every member would say the same.
    Final,
}

/// What is wrong with etcd, as far as can be told from here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Cause {
    /// No answer: the process, the host or the network is gone.
    Unreachable,
    /// It answers, and has no leader: too few members are up.
    NoLeader,
    /// User, password or certificate are not accepted.
    Auth,
    /// The user may not do this.
    Permission,
    /// Too large, out of space, compacted, a bug: see the sentence.
    Refused,
    /// The lease is not there.
    Lease,
}

/// See the module's text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Failure {
    pub(super) verdict: Verdict,
    pub(super) cause: Cause,
    pub(super) sentence: String,
}

impl Failure {
    pub(super) fn new(verdict: Verdict, cause: Cause, sentence: impl Into<String>) -> Self {
        Self { verdict, cause, sentence: sentence.into() }
    }

    /// The member did not answer in time.
    pub(super) fn silent(millis: u128) -> Self {
        Self::new(Verdict::Unknown, Cause::Unreachable, format!("no answer within {millis} ms"))
    }

    /// The connection could not be made.
    pub(super) fn unconnected(sentence: String) -> Self {
        Self::new(Verdict::Elsewhere, Self::of_transport(&sentence), sentence)
    }

    /// TLS says at the connection, or with TLS 1.3 at the first request, that a certificate is missing or not accepted.
    fn of_transport(sentence: &str) -> Cause {
        if sentence.to_ascii_lowercase().contains("certificate") { Cause::Auth } else { Cause::Unreachable }
    }

    /// What etcd or the connection to it said.
    pub(super) fn of(error: &Error) -> Self {
        match error {
            Error::GRpcStatus(status) => Self::of_status(status),
            Error::LeaseKeepAliveError(text) if text.contains("not found") => {
                Self::new(Verdict::Final, Cause::Lease, "the lease is not there")
            }
            // Its channel is full or closed: what was asked has not left this process for certain.
            other => {
                let sentence = innermost(other);
                Self::new(Verdict::Unknown, Self::of_transport(&sentence), sentence)
            }
        }
    }

    fn of_status(status: &Status) -> Self {
        let said = status.message();
        // etcd's own sentences are its interface: clients tell its errors apart by them, their codes are too coarse.
        let has = |part: &str| said.contains(part);
        let root = innermost(status);
        let (verdict, cause) = match status.code() {
            _ if has("lease not found") => (Verdict::Final, Cause::Lease),
            // Said before anything was proposed.
            _ if has("etcdserver: no leader") || has("etcdserver: not leader") => {
                (Verdict::Elsewhere, Cause::NoLeader)
            }
            _ if has("timed out, possibly due to connection lost") || has("leader changed") => {
                (Verdict::Unknown, Cause::NoLeader)
            }
            _ if has("etcdserver: request timed out") => (Verdict::Unknown, Cause::NoLeader),
            _ if has("server stopped") => (Verdict::Unknown, Cause::Unreachable),
            _ if has("authentication failed") || has("user name is empty") || has("invalid auth token") => {
                (Verdict::Final, Cause::Auth)
            }
            _ if has("authentication is not enabled") => (Verdict::Final, Cause::Auth),
            Code::Unauthenticated => (Verdict::Final, Cause::Auth),
            Code::PermissionDenied => (Verdict::Final, Cause::Permission),
            Code::InvalidArgument
            | Code::FailedPrecondition
            | Code::OutOfRange
            | Code::NotFound
            | Code::Unimplemented => (Verdict::Final, Cause::Refused),
            // "database space exceeded", "request is too large", "too many requests".
            Code::ResourceExhausted if has("too many requests") => (Verdict::Elsewhere, Cause::Refused),
            Code::ResourceExhausted => (Verdict::Final, Cause::Refused),
            _ => (Verdict::Unknown, Self::of_transport(&root)),
        };
        let sentence = match std::error::Error::source(status) {
            Some(_) => format!("{said}: {root}"),
            None => said.to_owned(),
        };
        Self::new(verdict, cause, sentence)
    }

    /// For the caller of the store. `lease` is the one that was asked with.
    pub(super) fn into_store_error(self, lease: LeaseId) -> StoreError {
        let sentence = self.sentence;
        match self.cause {
            Cause::Lease => StoreError::LeaseNotFound(lease),
            Cause::Unreachable => StoreError::Unavailable(format!("etcd cannot be reached: {sentence}")),
            Cause::NoLeader => {
                StoreError::NoQuorum(format!("etcd has no leader, too few members are up: {sentence}"))
            }
            Cause::Auth => StoreError::Denied(format!(
                "etcd does not accept who we are (store.username, store.password, store.cert_file): {sentence}"
            )),
            Cause::Permission => StoreError::Denied(format!(
                "etcd's user may not do this (it needs read and write on store.prefix): {sentence}"
            )),
            Cause::Refused => StoreError::Invalid(format!("etcd refuses it: {sentence}")),
        }
    }
}

/// The error at the root of others, which is the one that says something.
pub(super) fn innermost(error: &(dyn std::error::Error + 'static)) -> String {
    let mut cause = error;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    cause.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn etcds_sentences_are_told_apart() {
        for (code, said, verdict, cause) in [
            (Code::Unavailable, "etcdserver: no leader", Verdict::Elsewhere, Cause::NoLeader),
            (Code::Unavailable, "etcdserver: leader changed", Verdict::Unknown, Cause::NoLeader),
            (Code::Unavailable, "etcdserver: request timed out", Verdict::Unknown, Cause::NoLeader),
            (
                Code::Unavailable,
                "etcdserver: request timed out, possibly due to previous leader failure",
                Verdict::Unknown,
                Cause::NoLeader,
            ),
            (Code::Unavailable, "error trying to connect", Verdict::Unknown, Cause::Unreachable),
            (Code::NotFound, "etcdserver: requested lease not found", Verdict::Final, Cause::Lease),
            (Code::PermissionDenied, "etcdserver: permission denied", Verdict::Final, Cause::Permission),
            (
                Code::InvalidArgument,
                "etcdserver: authentication failed, invalid user ID or password",
                Verdict::Final,
                Cause::Auth,
            ),
            (Code::InvalidArgument, "etcdserver: user name is empty", Verdict::Final, Cause::Auth),
            (Code::InvalidArgument, "etcdserver: request is too large", Verdict::Final, Cause::Refused),
            (
                Code::ResourceExhausted,
                "etcdserver: mvcc: database space exceeded",
                Verdict::Final,
                Cause::Refused,
            ),
            (Code::ResourceExhausted, "etcdserver: too many requests", Verdict::Elsewhere, Cause::Refused),
        ] {
            let failure = Failure::of(&Error::GRpcStatus(Status::new(code, said)));
            assert_eq!((failure.verdict, failure.cause), (verdict, cause), "{said}");
        }
    }
}
