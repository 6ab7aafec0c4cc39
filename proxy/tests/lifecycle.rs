//! The process under signals: drain, binary upgrade, new certificates.

#![allow(clippy::unwrap_used)]

mod support;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;
use support::{daemon::Daemon, tls::*, *};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::JoinSet,
};

/// For what takes a process's start, on a machine that is busy with other tests.
const STARTED: Duration = Duration::from_secs(60);

async fn wait(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + STARTED;
    while !condition() {
        assert!(Instant::now() < deadline, "not so within {STARTED:?}: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// An engine whose streams have a first event at once, and the rest after that time.
async fn paused(stream_ms: u64) -> Engine {
    Engine::start(move |_| {
        let head = [SSE_HEAD, &chunk(&delta("one"))].concat();
        let rest = [&chunk(&delta("two")), &chunk("data: [DONE]\n\n"), "0\r\n\r\n"].concat();
        vec![Step::Send(head.into()), Step::Pause(Duration::from_millis(stream_ms)), Step::Send(rest.into())]
    })
    .await
}

/// Clients that ask without a pause until they are told to stop.
struct Load {
    clients: JoinSet<()>,
    stop: Arc<AtomicBool>,
    done: Arc<AtomicUsize>,
}

impl Load {
    /// Half of the clients keep their connection, half open one for each request; every second request is a stream.
    fn start(address: std::net::SocketAddr, clients: usize) -> Self {
        let (stop, done) = (Arc::<AtomicBool>::default(), Arc::<AtomicUsize>::default());
        let mut set = JoinSet::new();
        for number in 0..clients {
            let (stop, done) = (Arc::clone(&stop), Arc::clone(&done));
            set.spawn(async move {
                let mut kept: Option<Client> = None;
                while !stop.load(Relaxed) {
                    let mut client = match kept.take() {
                        Some(client) => client,
                        None => Client::connect(address).await,
                    };
                    let headers = if number % 2 == 0 { "" } else { "connection: close\r\n" };
                    client.send(&post_with(CHAT, headers, &chat(true))).await;
                    let answer = client.read_until("0\r\n\r\n").await;
                    assert!(answer.contains("[DONE]") && answer.contains("two"), "{answer}");
                    done.fetch_add(1, Relaxed);
                    client.received.clear();
                    let closes = answer.to_ascii_lowercase().contains("connection: close");
                    kept = (!closes).then_some(client);
                }
            });
        }
        Self { clients: set, stop, done }
    }

    /// Waits until so many more requests have been answered.
    async fn more(&self, requests: usize) {
        let goal = self.done.load(Relaxed) + requests;
        wait("the load goes on", || self.done.load(Relaxed) >= goal).await;
    }

    /// Ends it; panics if any request failed.
    async fn end(mut self) -> usize {
        self.stop.store(true, Relaxed);
        while let Some(client) = self.clients.join_next().await {
            client.expect("no request failed");
        }
        self.done.load(Relaxed)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_binary_upgrade_under_load_fails_nothing_twice_in_a_row() {
    let engine = paused(20).await;
    let mut daemon = Daemon::start("", &[engine.address]);
    let load = Load::start(daemon.address("public"), 16);
    load.more(100).await;
    let (address, mut pids) = (daemon.address("public"), vec![daemon.pid()]);
    for _ in 0..2 {
        let output = daemon.upgrade();
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
        let (old, new) = (*pids.last().unwrap(), daemon.pid());
        assert_ne!(new, old);
        assert!(said.contains(&format!("pid {new} ")) && said.contains(&format!("pid {old} ")), "{said}");
        assert_eq!(daemon.address("public"), address, "the sockets are the same");
        pids.push(new);
        load.more(200).await;
        wait("the old process ends when its clients have left it", || daemon.has_ended(old)).await;
    }
    assert_eq!(daemon.exit_code(), Some(0));
    let requests = load.end().await;
    assert!(requests >= 500, "{requests}");
    assert_eq!(daemon.private("/readyz").await.unwrap().0, 200);
    daemon.signal(Signal::SIGTERM);
    wait("the last one ends", || daemon.has_ended(pids[2])).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_from_before_an_upgrade_is_finished_by_the_old_process() {
    let engine = paused(4_000).await;
    let mut daemon = Daemon::start("", &[engine.address]);
    let old = daemon.pid();
    let mut client = Client::connect(daemon.address("public")).await;
    client.send(&post(CHAT, &chat(true))).await;
    client.read_until("one").await;
    daemon.signal(Signal::SIGUSR2);
    // A second one while the first is being answered starts nothing more.
    daemon.signal(Signal::SIGUSR2);
    wait("a successor announces itself", || daemon.pid() != old).await;
    let new = daemon.pid();
    assert!(!client.received.is_empty() && !daemon.has_ended(old), "the stream still runs");
    let answer = client.read_to_end().await;
    assert!(answer.contains("two") && answer.contains("[DONE]"), "{answer}");
    wait("the old process ends", || daemon.has_ended(old)).await;
    assert_eq!(daemon.exit_code(), Some(0));
    assert_eq!(daemon.pid(), new, "one successor");
}

/// logrotate meets two processes then, and moves the file away from both.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_an_upgrade_the_old_process_opens_its_log_again_too() {
    let engine = paused(6_000).await;
    let dir = tempfile::tempdir().unwrap();
    let (log, moved) = (dir.path().join("access.log"), dir.path().join("access.log.1"));
    let mut daemon = Daemon::start(&format!("telemetry.access_log = '{}'", log.display()), &[engine.address]);
    let old = daemon.pid();
    let mut client = Client::connect(daemon.address("public")).await;
    client.send(&post(CHAT, &chat(true))).await;
    client.read_until("one").await;
    assert!(daemon.upgrade().status.success());
    std::fs::rename(&log, &moved).unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(old), Signal::SIGHUP).unwrap();
    assert!(client.read_to_end().await.contains("[DONE]"));
    wait("the old process ends", || daemon.has_ended(old)).await;
    let lines = std::fs::read_to_string(&log).expect("opened again by the old process");
    assert_eq!(lines.lines().count(), 1, "{lines}");
    assert!(lines.contains("\"outcome\":\"completed\""), "{lines}");
    assert_eq!(std::fs::read_to_string(&moved).unwrap(), "");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_successor_that_fails_costs_nothing_and_is_told_about() {
    let engine = paused(5).await;
    let mut daemon = Daemon::start("upgrade.ready_ms = 60000", &[engine.address]);
    let pid = daemon.pid();
    let load = Load::start(daemon.address("public"), 4);
    daemon.write_settings("limits.body_bytez = 7");
    let output = daemon.upgrade();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains(&format!("pid {pid} goes on")) && said.contains("exit status: 2"), "{said}");
    assert!(daemon.log().contains("did you mean `limits.body_bytes`"), "{}", daemon.log());
    // A port that is taken: it ends with 1, after it got the other sockets.
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let listen = taken.local_addr().unwrap();
    daemon.write_settings(&format!("listeners.new.listen = '{listen}'"));
    assert!(String::from_utf8_lossy(&daemon.upgrade().stderr).contains("exit status: 1"));
    assert!(daemon.log().contains("listeners.new.listen"), "{}", daemon.log());
    let metrics = daemon.private("/metrics").await.unwrap().1;
    assert!(metrics.contains("penstock_proxy_upgrades_total{result=\"failed\"} 2"));
    assert_eq!((daemon.pid(), daemon.has_ended(pid)), (pid, false));
    load.more(50).await;
    // Mended, it works, and a listener that is new in the settings is there.
    drop(taken);
    let output = daemon.upgrade();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(daemon.address("new"), listen);
    load.more(50).await;
    load.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_successor_without_tables_does_not_take_over() {
    let engine = paused(5).await;
    let daemon = Daemon::start("upgrade.ready_ms = 700", &[engine.address]);
    let pid = daemon.pid();
    std::fs::remove_file(daemon.dir.path().join("snapshot")).unwrap();
    let output = daemon.upgrade();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("not ready within 700 ms"), "{said}");
    assert_eq!(daemon.pid(), pid);
    let mut client = Client::connect(daemon.address("public")).await;
    client.send(&post(CHAT, &chat(true))).await;
    assert!(client.read_to_end().await.contains("[DONE]"));
}

/// DR02: SIGTERM with 200 open streams.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sigterm_with_200_open_streams_fails_none_of_them() {
    let engine = Engine::start(|number| {
        let head = [SSE_HEAD, &chunk(&delta("one"))].concat();
        let rest = [&chunk(&delta("two")), &chunk("data: [DONE]\n\n"), "0\r\n\r\n"].concat();
        // The last five do not end by themselves.
        let end = if number < 195 {
            vec![Step::Pause(Duration::from_millis(2_000)), Step::Send(rest.into())]
        } else {
            vec![Step::UntilClosed]
        };
        [vec![Step::Send(head.into())], end].concat()
    })
    .await;
    let mut daemon = Daemon::start("drain.unready_ms = 300\ndrain.deadline_ms = 6000", &[engine.address]);
    let pid = daemon.pid();
    let mut clients = Vec::new();
    for _ in 0..200 {
        let mut client = Client::connect(daemon.address("public")).await;
        client.send(&post(CHAT, &chat(true))).await;
        client.read_until("one").await;
        clients.push(client);
    }
    let mut idle = Client::connect(daemon.address("public")).await;
    idle.send(&post_with("/v1/models", "", "")).await;
    idle.read_answer().await;
    daemon.signal(Signal::SIGTERM);
    let began = Instant::now();
    let mut ready = 200;
    while ready != 503 {
        assert!(began.elapsed() < Duration::from_secs(5), "readyz is still {ready}");
        ready = daemon.private("/readyz").await.unwrap().0;
    }
    assert_eq!(daemon.private("/livez").await.unwrap().0, 200);
    wait("no more connections", || std::net::TcpStream::connect(daemon.address("public")).is_err()).await;
    assert_eq!(idle.read_to_end().await, "", "an idle connection is closed");
    let (mut whole, mut told) = (0, 0);
    for mut client in clients {
        let answer = client.read_to_end().await;
        if answer.contains("[DONE]") {
            whole += 1;
        } else {
            assert!(answer.contains("gateway_draining") && answer.ends_with("0\r\n\r\n"), "{answer}");
            told += 1;
        }
    }
    assert_eq!((whole, told), (195, 5), "left-over streams get an error event, the others all of theirs");
    wait("it ends", || daemon.has_ended(pid)).await;
    assert_eq!(daemon.exit_code(), Some(0));
}

/// DR02 over TLS: what was promised to a stream is kept behind a handshake, too, and a closed session is told as one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sigterm_over_tls_finishes_streams_tells_what_is_left_and_closes_sessions_properly() {
    let engine = Engine::start(|number| {
        let head = [SSE_HEAD, &chunk(&delta("one"))].concat();
        let rest = [&chunk(&delta("two")), &chunk("data: [DONE]\n\n"), "0\r\n\r\n"].concat();
        let end = if number < 18 {
            vec![Step::Pause(Duration::from_millis(1_500)), Step::Send(rest.into())]
        } else {
            vec![Step::UntilClosed]
        };
        [vec![Step::Send(head.into())], end].concat()
    })
    .await;
    let authority = Authority::new();
    let dir = tempfile::tempdir().unwrap();
    authority.pair("edge", 2040).write(dir.path());
    let path = |name: &str| dir.path().join(name).display().to_string();
    let settings = format!(
        "drain.unready_ms = 200\ndrain.deadline_ms = 5000\nlisteners.tls.listen = '127.0.0.1:0'\n\
         listeners.tls.certificate = '{}'\nlisteners.tls.key = '{}'",
        path("tls.crt"),
        path("tls.key")
    );
    let mut daemon = Daemon::start(&settings, &[engine.address]);
    let (pid, address) = (daemon.pid(), daemon.address("tls"));
    let client = authority.client(&["http/1.1"], &[&rustls::version::TLS13], None);
    let mut streams = Vec::new();
    for _ in 0..20 {
        let mut stream = connect(&client, address).await.unwrap();
        stream.write_all(&post_with(CHAT, "", &chat(true))).await.unwrap();
        let begun = read_until(&mut stream, "one").await;
        streams.push((stream, begun));
    }
    let mut idle = connect(&client, address).await.unwrap();
    idle.write_all(&post_with("/v1/models", "", "")).await.unwrap();
    read_until(&mut idle, "\r\n\r\n").await;
    daemon.signal(Signal::SIGTERM);
    wait("no more connections", || std::net::TcpStream::connect(address).is_err()).await;
    // An end without close_notify would be an error here: nobody could tell it from an attack.
    idle.read_to_end(&mut Vec::new()).await.expect("a session that is closed");
    let (mut whole, mut told) = (0, 0);
    for (mut stream, mut answer) in streams {
        let mut rest = Vec::new();
        stream.read_to_end(&mut rest).await.expect("a session that is closed");
        answer.push_str(&String::from_utf8_lossy(&rest));
        if answer.contains("[DONE]") {
            whole += 1;
        } else {
            assert!(answer.contains("gateway_draining") && answer.ends_with("0\r\n\r\n"), "{answer}");
            told += 1;
        }
    }
    assert_eq!((whole, told), (18, 2));
    wait("it ends", || daemon.has_ended(pid)).await;
    assert_eq!(daemon.exit_code(), Some(0));
}

/// DR41: certificates rotated under load, in the process as it is run; SIGHUP makes it look at once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn certificates_are_rotated_by_sighup_and_kept_through_an_upgrade() {
    let authority = Authority::new();
    let dir = tempfile::tempdir().unwrap();
    authority.pair("first", 2040).write(dir.path());
    let path = |name: &str| dir.path().join(name).display().to_string();
    let settings = format!(
        "listeners.tls.listen = '127.0.0.1:0'\nlisteners.tls.certificate = '{}'\nlisteners.tls.key = '{}'",
        path("tls.crt"),
        path("tls.key")
    );
    let engine = paused(20).await;
    let own = tempfile::tempdir().unwrap();
    let mut daemon = Daemon::start_in(own, &settings, &[engine.address]);
    let address = daemon.address("tls");
    let client = authority.client(&["http/1.1"], &[&rustls::version::TLS13], None);
    let first = shown(&connect(&client, address).await.unwrap());
    let ask = async |stream: &mut tokio_rustls::client::TlsStream<TcpStream>| {
        stream.write_all(&post_with(CHAT, "", &chat(true))).await.unwrap();
        read_until(stream, "0\r\n\r\n").await
    };
    let mut open = connect(&client, address).await.unwrap();
    assert!(ask(&mut open).await.contains("[DONE]"));

    authority.pair("second", 2041).write(dir.path());
    daemon.signal(Signal::SIGHUP);
    wait("the reload is logged", || daemon.log().contains("new certificates are in use")).await;
    let second = shown(&connect(&client, address).await.unwrap());
    assert_ne!(second, first);
    assert!(ask(&mut open).await.contains("[DONE]"), "the connection from before is used on");
    std::fs::write(dir.path().join("tls.crt"), "nonsense").unwrap();
    daemon.signal(Signal::SIGHUP);
    wait("the refusal is logged", || daemon.log().contains("new certificates are refused")).await;
    assert_eq!(shown(&connect(&client, address).await.unwrap()), second);
    let metrics = daemon.private("/metrics").await.unwrap().1;
    let expires = rcgen::date_time_ymd(2041, 1, 1).unix_timestamp();
    for line in [
        format!("penstock_proxy_certificate_expiry_timestamp_seconds{{listener=\"tls\"}} {expires}"),
        "penstock_proxy_certificate_reloads_total{listener=\"tls\",result=\"loaded\"} 1".into(),
        "penstock_proxy_certificate_reloads_total{listener=\"tls\",result=\"refused\"} 1".into(),
    ] {
        assert!(metrics.contains(&line), "{line} in\n{metrics}");
    }
    // What cannot be loaded stops a successor, too, and the old process keeps the certificate that it has.
    assert!(!daemon.upgrade().status.success());
    authority.pair("third", 2042).write(dir.path());
    let old = daemon.pid();
    assert!(daemon.upgrade().status.success());
    assert!(
        ask(&mut open).await.to_ascii_lowercase().contains("connection: close"),
        "once more, and then it ends"
    );
    assert_eq!(open.read_to_end(&mut Vec::new()).await.unwrap(), 0);
    assert_ne!(shown(&connect(&client, address).await.unwrap()), second);
    wait("the old process ends", || daemon.has_ended(old)).await;
}
