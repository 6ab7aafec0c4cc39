//! The progress bar: on a terminal only, and never on the output.

use std::{
    io::IsTerminal,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use indicatif::{ProgressBar, ProgressStyle};
use tokio::{task::JoinSet, time::Instant};

use super::{Options, lane::Shared};

/// How often it is drawn.
const DRAW: Duration = Duration::from_millis(250);

/// Shows how far `shared` is, until it is dropped; none if nobody looks.
pub(super) fn show(options: &Options, shared: &Arc<Shared>) -> Option<JoinSet<()>> {
    if options.quiet || !std::io::stderr().is_terminal() {
        return None;
    }
    let requests = options.requests_to_make();
    let by_requests = requests != u64::MAX;
    let length = if by_requests { requests } else { super::lengths::whole(options.duration_s) };
    let bar = ProgressBar::new(length);
    // A style that cannot be parsed is replaced by the crate's own.
    let style = ProgressStyle::with_template("{elapsed_precise} {wide_bar} {pos}/{len} {msg}")
        .unwrap_or_else(|_| ProgressStyle::default_bar());
    bar.set_style(style);
    let (shared, began) = (Arc::clone(shared), Instant::now());
    let mut task = JoinSet::new();
    task.spawn(async move {
        let bar = Cleared(bar);
        let (mut before, mut at) = (0, began);
        loop {
            tokio::time::sleep(DRAW).await;
            let [events, good, failed, not_sent] =
                [0, 1, 2, 3].map(|i: usize| shared.counts.get(i).map_or(0, |n| n.load(Ordering::Relaxed)));
            let now = Instant::now();
            let rate = events.saturating_sub(before) as f64 / (now - at).as_secs_f64();
            (before, at) = (events, now);
            bar.0.set_position(if by_requests {
                good + failed
            } else {
                began.elapsed().as_secs().min(length)
            });
            let unit = if by_requests { "requests" } else { "s" };
            bar.0.set_message(format!(
                "{unit}, {good} good, {failed} failed, {not_sent} not sent, {rate:.0} events/s"
            ));
        }
    });
    Some(task)
}

/// Leaves no trace on the terminal.
struct Cleared(ProgressBar);

impl Drop for Cleared {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}
