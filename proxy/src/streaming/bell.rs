//! Waiting for one thing often and for others seldom.
//!
//! A task that waits for an engine's bytes also waits for its client's leaving, a timer, the gateway's last call. With
//! `select!` each of these is polled again at every wake-up, and nearly every wake-up is an event's. Behind a [`Bell`] they are
//! polled when they have rung it, and not otherwise.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Wake, Waker},
};

use futures_util::task::AtomicWaker;

/// What rings when something that is seldom waited for may have happened.
#[derive(Debug)]
pub struct Bell {
    shared: Arc<Shared>,
    waker: Waker,
}

#[derive(Debug)]
struct Shared {
    rung: AtomicBool,
    task: AtomicWaker,
}

impl Wake for Shared {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        // Before the task is woken: it looks here first.
        self.rung.store(true, Ordering::Release);
        self.task.wake();
    }
}

impl Default for Bell {
    /// One that has rung: what it is for has not been looked at yet.
    fn default() -> Self {
        let shared = Arc::new(Shared { rung: AtomicBool::new(true), task: AtomicWaker::new() });
        Self { waker: Waker::from(Arc::clone(&shared)), shared }
    }
}

impl Bell {
    /// Whether it has rung since it was last asked, or never was asked; then everything behind it has to be polled with
    /// [`Self::context`] until that is pending. From here on it wakes the task of `cx`.
    pub fn has_rung(&self, cx: &Context<'_>) -> bool {
        self.shared.task.register(cx.waker());
        // A load where nothing has happened: the swap would take the line for writing at each event.
        self.shared.rung.load(Ordering::Acquire) && self.shared.rung.swap(false, Ordering::AcqRel)
    }

    /// Rings it: what is behind it has to be polled again.
    pub fn ring(&self) {
        self.shared.rung.store(true, Ordering::Release);
    }

    /// What the seldom things are to be polled with.
    pub fn context(&self) -> Context<'_> {
        Context::from_waker(&self.waker)
    }
}

#[cfg(test)]
mod tests {
    use std::{future::poll_fn, task::Poll, time::Duration};

    use futures_util::FutureExt;
    use tokio::{sync::Notify, time::timeout};

    use super::*;

    #[tokio::test]
    async fn what_is_behind_it_is_polled_at_first_and_when_it_has_rung() {
        let (often, seldom, bell) = (Arc::new(Notify::new()), Arc::new(Notify::new()), Bell::default());
        let mut polls = 0;
        let mut behind = Box::pin(seldom.notified());
        let mut wait = async || {
            let mut frequent = Box::pin(often.notified());
            poll_fn(|cx| {
                if frequent.poll_unpin(cx).is_ready() {
                    return Poll::Ready("often");
                }
                if bell.has_rung(cx) {
                    polls += 1;
                    if behind.poll_unpin(&mut bell.context()).is_ready() {
                        return Poll::Ready("seldom");
                    }
                }
                Poll::Pending
            })
            .await
        };
        for _ in 0..10 {
            let (said, ()) = tokio::join!(wait(), async { often.notify_one() });
            assert_eq!(said, "often");
        }
        let (said, ()) = tokio::join!(wait(), async { seldom.notify_one() });
        assert_eq!(said, "seldom");
        assert!(polls <= 2, "{polls}");
    }

    #[tokio::test]
    async fn a_ring_that_comes_with_something_else_is_not_lost() {
        let (bell, notify) = (Bell::default(), Notify::new());
        let mut behind = Box::pin(notify.notified());
        let first = poll_fn(|cx| Poll::Ready(bell.has_rung(cx))).await;
        assert!(first && behind.poll_unpin(&mut bell.context()).is_pending());
        // Rung while nobody waits: as when the same wake-up brought bytes.
        notify.notify_waiters();
        let waited = timeout(
            Duration::from_secs(5),
            poll_fn(|cx| match bell.has_rung(cx) {
                true => behind.poll_unpin(&mut bell.context()),
                false => Poll::Pending,
            }),
        );
        assert!(waited.await.is_ok());
    }
}
