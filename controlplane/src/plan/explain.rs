//! Why a replica finds no place, in a sentence: which rule took out how many nodes.

use std::collections::BTreeMap;

use super::{gpus::Request, nodes::Refusal};

/// Reasons that are told one by one before the rest is only counted.
const MAX_REASONS: usize = 6;

/// Why a replica found no place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Shortage {
    pub(super) request: Request,
    pub(super) nodes: usize,
    /// GPUs that offer enough, on nodes that may take the replica.
    pub(super) free: usize,
    /// Healthy GPUs on them.
    pub(super) usable: usize,
    /// Most that offer enough on any one node.
    pub(super) most_on_one: usize,
    /// Each node's first reason.
    pub(super) reasons: BTreeMap<Refusal, usize>,
}

impl Shortage {
    /// "waits for ..."
    pub(super) fn sentence(&self) -> String {
        let Self { request, nodes, free, usable, most_on_one, reasons } = self;
        let needed = request.gpus;
        let memory = match request.memory_bytes {
            0 => String::new(),
            bytes => format!(" with {} free", size(bytes)),
        };
        let gpus = match needed {
            1 => format!("a GPU{memory}"),
            _ => format!("{needed} GPUs{memory} on one node"),
        };
        if *nodes == 0 {
            return "waits for a node: none is present".into();
        }
        let only_room = reasons.keys().all(|r| matches!(r, Refusal::TooFewGpus | Refusal::Busy));
        if only_room && request.memory_bytes == 0 {
            return match *free >= needed {
                true => format!(
                    "waits for {gpus}: at most {most_on_one} are free on any one node, {free} free of {usable}"
                ),
                false => format!("waits for {gpus}: needs {needed}, {free} free of {usable}"),
            };
        }
        let told = reasons.iter().take(MAX_REASONS).map(|(reason, count)| self.reason(reason, *count));
        let mut told: Vec<String> = told.collect();
        let rest: usize = reasons.values().skip(MAX_REASONS).sum();
        if rest > 0 {
            told.push(format!("{rest} for other reasons"));
        }
        let of = if *nodes == 1 { "of 1 node".to_owned() } else { format!("of {nodes} nodes") };
        format!("waits for {gpus}: {of} {}", told.join(", "))
    }

    fn reason(&self, reason: &Refusal, count: usize) -> String {
        let (is, has) = if count == 1 { ("is", "has") } else { ("are", "have") };
        let needed = self.request.gpus;
        match reason {
            Refusal::ControlOnly => format!("{count} {is} control-only"),
            Refusal::Arbitration => format!("{count} {is} for arbitration only"),
            Refusal::Maintenance => format!("{count} {is} in maintenance"),
            Refusal::Cordoned => format!("{count} {is} cordoned"),
            Refusal::Label(label) => format!("{count} {has} no label {label}"),
            Refusal::Taint(taint) => format!("{count} {has} the taint {taint}"),
            Refusal::Failed => format!("{count} made it fail over and over"),
            Refusal::TooFewGpus => format!("{count} {has} fewer than {needed} usable"),
            Refusal::TooSmall => format!("{count} {has} too small GPUs"),
            Refusal::Busy => format!("{count} {has} too few free (at most {})", self.most_on_one),
        }
    }
}

/// Bytes for people.
fn size(bytes: u64) -> String {
    const GIB: u64 = 1 << 30;
    match bytes.is_multiple_of(GIB) {
        true => format!("{} GiB", bytes / GIB),
        false => format!("{} MiB", bytes.div_ceil(1 << 20)),
    }
}
