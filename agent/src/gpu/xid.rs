//! XIDs: the numbers under which NVIDIA's driver reports errors of a GPU, what they mean, and what would help.
//!
//! Numbers, meanings and remedies are those of NVIDIA's "XID Errors" (docs.nvidia.com/deploy/xid-errors, the catalog's
//! "immediate action"). Only those that data-centre cards report in practice are here; another number is shown as it is.
//! Which of them make a GPU faulty is not decided here: the settings `gpus.policy.fault_xids` and `degrade_xids` say it.

use super::Remedy;

/// Number, meaning, what would help.
const KNOWN: [(u32, &str, Remedy); 31] = [
    (8, "GPU stopped processing", Remedy::None),
    (11, "invalid or corrupted push buffer stream", Remedy::None),
    (13, "graphics engine exception: an application's error, as a rule", Remedy::None),
    (31, "memory page fault: an application's error, as a rule", Remedy::None),
    (32, "invalid or corrupted push buffer stream", Remedy::None),
    (38, "driver firmware error", Remedy::Reset),
    (43, "an application's channel was stopped after its error", Remedy::None),
    (44, "graphics engine fault during a context switch", Remedy::None),
    (45, "an application's channels were torn down", Remedy::None),
    (46, "GPU stopped processing", Remedy::Reset),
    (48, "double-bit ECC error", Remedy::Reset),
    (61, "internal micro-controller breakpoint", Remedy::Reset),
    (62, "internal micro-controller halt", Remedy::Reset),
    (63, "a memory row was remapped (or a page retired); done at the next reset", Remedy::Reset),
    (64, "a memory row could not be remapped (or a page not retired)", Remedy::Reset),
    (68, "video processor exception", Remedy::None),
    (69, "graphics engine class error", Remedy::None),
    (74, "NVLink error", Remedy::Reset),
    (79, "GPU has fallen off the bus", Remedy::Reboot),
    (92, "high rate of single-bit ECC errors", Remedy::Reset),
    (94, "contained ECC error: the application that met it was ended", Remedy::Reset),
    (95, "uncontained ECC error", Remedy::Reset),
    (109, "context switch timeout", Remedy::None),
    (110, "security fault", Remedy::Reboot),
    (119, "the GPU's system processor (GSP) does not answer", Remedy::Reset),
    (120, "error of the GPU's system processor (GSP)", Remedy::Reset),
    (121, "error of the link to the CPU (C2C)", Remedy::Reset),
    (137, "NVLink fault of an application", Remedy::None),
    (140, "ECC error that was not recovered", Remedy::Reset),
    (143, "GPU could not be initialized", Remedy::Reset),
    (154, "the driver changed what it asks for to recover the GPU", Remedy::None),
];

/// What the XID means; empty where that is not known here.
pub(crate) fn meaning(xid: u32) -> &'static str {
    KNOWN.iter().find(|known| known.0 == xid).map_or("", |known| known.1)
}

/// What would help; of an unknown one that condemns a GPU, a reset.
pub(crate) fn remedy(xid: u32) -> Remedy {
    KNOWN.iter().find(|known| known.0 == xid).map_or(Remedy::Reset, |known| known.2)
}

/// "XID 79 (GPU has fallen off the bus)"
pub(crate) fn named(xid: u32) -> String {
    match meaning(xid) {
        "" => format!("XID {xid}"),
        meaning => format!("XID {xid} ({meaning})"),
    }
}

#[cfg(test)]
mod tests {
    use penstock_config::agent::GpuPolicyConfig;

    use super::*;

    #[test]
    fn every_xid_that_condemns_by_default_has_a_meaning() {
        let policy = GpuPolicyConfig::default();
        for xid in policy.fault_xids.iter().chain(&policy.degrade_xids) {
            assert!(!meaning(*xid).is_empty(), "{xid}");
            assert_ne!(remedy(*xid), Remedy::None, "{xid}");
        }
        assert!(KNOWN.is_sorted_by_key(|known| known.0));
        assert_eq!(named(79), "XID 79 (GPU has fallen off the bus)");
        assert_eq!((named(9_999).as_str(), remedy(9_999)), ("XID 9999", Remedy::Reset));
    }
}
