//! The layout of keys, and how names are written in them.
//!
//! Names are percent-encoded, because a model's name may hold a slash and a prefix must not match half a name.
//! Nothing reads a name back out of a key: values carry their names, so that there is one place to trust.

/// Prefix of every key.
pub const ROOT: &str = "/";
/// Prefix of deployments.
pub const DEPLOYMENTS: &str = "/deployments/";
/// Prefix of placements.
pub const PLACEMENTS: &str = "/placements/";
/// Prefix of endpoints.
pub const ENDPOINTS: &str = "/endpoints/";
/// Prefix of nodes.
pub const NODES: &str = "/nodes/";
/// Prefix of routes.
pub const ROUTES: &str = "/routes/";
/// Prefix of drains.
pub const DRAINS: &str = "/drains/";
/// Prefix of what deployments were.
pub const REVISIONS: &str = "/revisions/";
/// Prefix of what operators say of nodes.
pub const NODE_POLICIES: &str = "/node-policies/";
/// Prefix of tokens of the REST API.
pub const TOKENS: &str = "/tokens/";
/// Written with each change of a token, so that no two are decided upon by the same state.
pub const TOKENS_CHANGED: &str = "/meta/tokens";
/// Where the chain of audit records begins and ends.
pub const AUDIT_HEAD: &str = "/audit/head";
/// Prefix of audit records, in blocks of [`AUDIT_BLOCK`].
pub const AUDIT_RECORDS: &str = "/audit/records/";
/// Prefix of answers to requests that may be repeated.
pub const IDEMPOTENCY: &str = "/idempotency/";
/// Who may write ([`crate::leadership::Leader`]); written once per term, and its revision is the term. With etcd it hangs
/// on the leader's lease.
pub const LEADER: &str = "/meta/leader";
/// Written in the same transaction as each [`LEADER`], so its revision is the last term also while nobody leads.
pub const TERM: &str = "/meta/term";
/// Holds the last generation given out, in decimal.
pub const GENERATION: &str = "/meta/generation";
/// Written when an operator lets pass what is held back from proxies; its revision is what counts.
pub const LET_PASS: &str = "/meta/let-pass";
/// Holds the version of this layout, in decimal.
pub const SCHEMA: &str = "/meta/schema";
/// What a restore put before the terms of this store, in decimal: peers know the sum, so that terms never fall for them.
pub const TERM_BASE: &str = "/meta/term-base";
/// Audit records that one listing reads.
pub const AUDIT_BLOCK: u64 = 100;

/// What an operator wants of a model.
pub fn deployment(model: &str) -> String {
    format!("{DEPLOYMENTS}{}", encode(model))
}

/// The plan of a model.
pub fn placement(model: &str) -> String {
    format!("{PLACEMENTS}{}", encode(model))
}

/// A registered engine.
pub fn endpoint(model: &str, replica_id: &str) -> String {
    format!("{ENDPOINTS}{}/{}", encode(model), encode(replica_id))
}

/// A node that is present.
pub fn node(node_id: &str) -> String {
    format!("{NODES}{}", encode(node_id))
}

/// What a deployment was.
pub fn revisions(model: &str) -> String {
    format!("{REVISIONS}{}", encode(model))
}

/// What an operator says of a node, present or not.
pub fn node_policy(node_id: &str) -> String {
    format!("{NODE_POLICIES}{}", encode(node_id))
}

/// Where a name leads.
pub fn route(name: &str) -> String {
    format!("{ROUTES}{}", encode(name))
}

/// An operator's drain.
pub fn drain(model: &str, replica_id: &str) -> String {
    format!("{DRAINS}{}/{}", encode(model), encode(replica_id))
}

/// A token of the REST API.
pub fn token(name: &str) -> String {
    format!("{TOKENS}{}", encode(name))
}

/// The answer to a request that may be repeated; `digest` is hex.
pub fn idempotency(digest: &str) -> String {
    format!("{IDEMPOTENCY}{digest}")
}

/// Prefix of the audit records of a block.
pub fn audit_block(block: u64) -> String {
    format!("{AUDIT_RECORDS}{block:016}/")
}

/// An audit record.
pub fn audit_record(number: u64) -> String {
    format!("{}{number:020}", audit_block(number / AUDIT_BLOCK))
}

/// `name` with every byte but `A-Za-z0-9._-:@` as %XX.
pub fn encode(name: &str) -> String {
    let mut out = String::with_capacity(name.len());
    for byte in name.bytes() {
        if byte.is_ascii_alphanumeric() || b"._-:@".contains(&byte) {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

/// Undoes percent-encoding, as in a URL's path; None if it is malformed or not UTF-8.
pub fn decode(text: &str) -> Option<String> {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        if byte == b'%' {
            let digits = [bytes.next()?, bytes.next()?];
            if !digits.iter().all(u8::is_ascii_hexdigit) {
                return None;
            }
            out.push(u8::from_str_radix(std::str::from_utf8(&digits).ok()?, 16).ok()?);
        } else {
            out.push(byte);
        }
    }
    String::from_utf8(out).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_slash_in_a_name_stays_inside_its_segment() {
        assert_eq!(endpoint("Qwen/Qwen2.5", "Qwen-Qwen2-5-0"), "/endpoints/Qwen%2FQwen2.5/Qwen-Qwen2-5-0");
        assert!(!endpoint("a/b", "x").starts_with(&format!("{ENDPOINTS}a/")));
    }

    #[test]
    fn malformed_escapes_are_refused() {
        for text in ["%", "%2", "%zz", "%+1", "%FF"] {
            assert_eq!(decode(text), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn encoding_is_undone_and_is_injective(name in ".{0,40}") {
            prop_assert_eq!(decode(&encode(&name)), Some(name));
        }
    }
}
