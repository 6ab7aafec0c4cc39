//! Engines that do nothing but write paced events, each with the time at which it was written.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::JoinSet,
    time::{MissedTickBehavior, interval_at},
};

use super::Options;

/// Listeners that the endpoints' addresses lead to.
const ENGINES: usize = 4;

/// What comes before an event's time, in nanoseconds since the run's epoch.
pub(super) const STAMP: &str = "data: {\"t\":";

const HEAD: &[u8] =
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";

/// Starts them; they end with `tasks`.
pub(super) async fn start(
    options: &Options,
    epoch: Instant,
    tasks: &mut JoinSet<()>,
) -> Result<Vec<SocketAddr>, String> {
    let pause = Duration::try_from_secs_f64(1.0 / options.events_per_s)
        .ok()
        .filter(|pause| !pause.is_zero())
        .ok_or("--events-per-s must be a positive number")?;
    let mut addresses = Vec::new();
    for _ in 0..ENGINES {
        let listener = TcpListener::bind("127.0.0.1:0").await.map_err(|e| format!("cannot listen: {e}"))?;
        addresses.push(listener.local_addr().map_err(|e| e.to_string())?);
        tasks.spawn(async move {
            let mut open = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                open.spawn(serve(stream, epoch, pause));
            }
        });
    }
    Ok(addresses)
}

/// One request, answered until the proxy leaves.
async fn serve(mut stream: TcpStream, epoch: Instant, pause: Duration) {
    let mut request = Vec::new();
    while !request.ends_with(b"}") {
        match stream.read_buf(&mut request).await {
            Ok(1..) => {}
            _ => return,
        }
    }
    if stream.set_nodelay(true).is_err() || stream.write_all(HEAD).await.is_err() {
        return;
    }
    // Streams that begin together do not tick together.
    let first = tokio::time::Instant::now() + pause.mul_f64(fastrand::f64());
    let mut ticks = interval_at(first, pause);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let event = format!(
            "{STAMP}{},\"choices\":[{{\"index\":0,\"delta\":{{\"content\":\" token\"}},\"finish_reason\":null}}]}}\n\n",
            epoch.elapsed().as_nanos()
        );
        let chunk = format!("{:x}\r\n{event}\r\n", event.len());
        if stream.write_all(chunk.as_bytes()).await.is_err() {
            return;
        }
    }
}
