//! Checks that a person would make, made by a program: `doctor` of a site, `preflight` of a machine, and the choice of
//! etcd's members.
//!
//! Each gathers facts in one place and judges them in another: what is judged is a pure function of the facts, tested
//! without a site. A finding says how it is, why that matters, and what to do.

mod certificate;
mod doctor;
mod findings;
mod judge;
mod machine;
mod preflight;
mod topology;

pub(crate) use doctor::run as doctor;
pub(crate) use preflight::run as preflight;
pub(crate) use topology::run as etcd_topology;
