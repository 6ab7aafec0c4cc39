//! What the proxy tells about itself: [`metrics`], every series it can emit.

pub mod metrics;
