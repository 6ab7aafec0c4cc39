//! A TCP relay that the test can close: what is behind it is then cut off, without touching the network's settings.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::Notify,
    task::JoinHandle,
};

/// See the module's text.
pub struct Gate {
    pub address: String,
    closed: Arc<AtomicBool>,
    opened: Arc<Notify>,
    task: JoinHandle<()>,
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Gate {
    /// Relays to `port` of this machine.
    pub async fn before(port: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (closed, opened) = (Arc::new(AtomicBool::new(false)), Arc::new(Notify::new()));
        let task = tokio::spawn(accept(listener, port, closed.clone(), opened.clone()));
        Self { address, closed, opened, task }
    }

    /// Nothing passes any more, in either direction; connections stay, and new ones are accepted and hang.
    pub fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
    }

    /// Everything passes again, also what was held.
    pub fn open(&self) {
        self.closed.store(false, Ordering::SeqCst);
        self.opened.notify_waiters();
    }
}

async fn accept(listener: TcpListener, port: u16, closed: Arc<AtomicBool>, opened: Arc<Notify>) {
    let mut pumps = tokio::task::JoinSet::new();
    while let Ok((near, _)) = listener.accept().await {
        let (closed, opened) = (closed.clone(), opened.clone());
        pumps.spawn(async move {
            pass(&closed, &opened).await;
            let Ok(far) = TcpStream::connect(("127.0.0.1", port)).await else { return };
            let ((near_in, near_out), (far_in, far_out)) = (near.into_split(), far.into_split());
            // Either end closing closes both.
            tokio::select! {
                () = pump(near_in, far_out, &closed, &opened) => {}
                () = pump(far_in, near_out, &closed, &opened) => {}
            }
        });
    }
}

async fn pass(closed: &AtomicBool, opened: &Notify) {
    loop {
        let open = opened.notified();
        if !closed.load(Ordering::SeqCst) {
            return;
        }
        open.await;
    }
}

async fn pump(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, closed: &AtomicBool, opened: &Notify) {
    let mut buffer = vec![0; 64 << 10];
    loop {
        let Ok(read) = from.read(&mut buffer).await else { return };
        pass(closed, opened).await;
        if read == 0 || to.write_all(&buffer[..read]).await.is_err() {
            return;
        }
    }
}
