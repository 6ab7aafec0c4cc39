//! The life of one generation request, from its place in the queue to its last byte.
//!
//! A [`Run`] belongs to its connection's task. The batch grants credits ([`Ticket`]); the run turns each into a token,
//! renders it and writes it. It looks at three things whenever it waits: credits, the peer (a close ends the run at
//! once, and its drop takes the sequences out of the batch), and the phase of the engine (a shutdown or a dead core ends
//! the stream as vLLM does). Faults are struck between tokens, in [`strike`].
//!
//! *Cost* per paced token: one wake, one render into a reused buffer, one write.

mod stream;
mod strike;
mod unary;

use std::{
    sync::{Arc, atomic::Ordering},
    task::Poll,
    time::Instant,
};

use futures_util::task::AtomicWaker;

use super::{
    error::ApiError,
    faults::{Fault, FaultKind},
    generation::{BLOCK_TOKENS, Generation},
    http::{Conn, Response},
    metrics::Metrics,
    record::Recorder,
    render::{Job, Render, Usage},
    scheduler::{Prompt, Ticket},
    state::{Counted, Engine, Phase},
};

/// What becomes of the connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Next {
    /// It may serve another request.
    Keep,
    /// It is dropped.
    Close,
}

/// What a waiting run sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wake {
    /// This choice may give out a token.
    Token(usize),
    /// The peer closed.
    Gone,
    /// The engine is shutting down, or dead.
    Interrupted,
}

/// One prompt and choice being generated.
struct Choice {
    generation: Generation,
    /// None once it has ended.
    ticket: Option<Ticket>,
    /// Hashes of its full blocks so far.
    blocks: Vec<u64>,
}

/// One request being answered.
pub(super) struct Run<'a> {
    engine: &'a Engine,
    conn: &'a mut Conn,
    recorder: &'a Recorder,
    render: Box<dyn Render>,
    fault: Option<Fault>,
    choices: Vec<Choice>,
    prompt_tokens: u64,
    waker: Arc<AtomicWaker>,
    /// The choice to look at first, so that all get their turn.
    cursor: usize,
    unfinished: usize,
    sent: u64,
    /// Cached prompt tokens, if the engine reports them; known from the first token on.
    cached: u64,
    text: String,
    clock: Clock,
    keep_alive: bool,
    _in_flight: Counted<'a>,
}

/// Times for the metrics.
struct Clock {
    arrived: Instant,
    first: Option<Instant>,
    last: Instant,
}

impl Clock {
    /// A token is given out now.
    fn token(&mut self, metrics: &Metrics) {
        let now = Instant::now();
        if self.first.is_some() {
            metrics.inter_token.observe((now - self.last).as_secs_f64());
        } else {
            self.first = Some(now);
            metrics.ttft.observe((now - self.arrived).as_secs_f64());
        }
        self.last = now;
    }
}

/// Runs `job` and answers on `conn`.
pub(super) async fn run(
    engine: &Engine,
    conn: &mut Conn,
    recorder: &Recorder,
    job: Job,
    fault: Option<Fault>,
    headers: &str,
    keep_alive: bool,
) -> Next {
    let in_flight = Counted::new(&engine.in_flight);
    let refuse = |conn: &mut Conn, error: &ApiError| {
        let mut response = Response::json(error.status, job.render.error_body(error));
        response.headers.push_str(headers);
        recorder.status(error.status);
        recorder.end("refused");
        conn.respond(&response, keep_alive);
    };
    if let Some(error) = engine.refusal() {
        refuse(conn, &error);
        return flushed(conn, keep_alive).await;
    }
    let waker = Arc::new(AtomicWaker::new());
    let prompts = job
        .generations
        .iter()
        .zip(&job.blocks)
        .map(|(generation, blocks)| Prompt { tokens: generation.prefix().len(), blocks: blocks.clone() });
    let slow_percent = fault.as_ref().map_or(100, Fault::slow_percent);
    let Ok(tickets) = engine.scheduler.submit(prompts, slow_percent, &waker) else {
        engine.metrics.admission_rejections.with_label_values(&["max_num_queued_reqs"]).inc();
        refuse(conn, &ApiError::busy());
        return flushed(conn, keep_alive).await;
    };
    let metrics = &engine.metrics;
    metrics.request_n.observe(f64::from(job.n));
    if let Some(max_tokens) = job.max_tokens {
        metrics.request_max_tokens.observe(max_tokens as f64);
    }
    let now = Instant::now();
    let choices: Vec<Choice> = job
        .generations
        .into_iter()
        .zip(job.blocks)
        .zip(tickets)
        .map(|((generation, blocks), ticket)| Choice { generation, ticket: Some(ticket), blocks })
        .collect();
    let run = Run {
        engine,
        conn,
        recorder,
        render: job.render,
        fault: fault.filter(|f| f.kind != FaultKind::Slow),
        unfinished: choices.len(),
        choices,
        prompt_tokens: job.prompt_tokens,
        waker,
        cursor: 0,
        sent: 0,
        cached: 0,
        text: String::new(),
        clock: Clock { arrived: now, first: None, last: now },
        keep_alive,
        _in_flight: in_flight,
    };
    if job.stream { run.stream(headers).await } else { run.unary(headers).await }
}

/// Sends what is pending; the connection is kept if that worked and it may be.
pub(super) async fn flushed(conn: &mut Conn, keep_alive: bool) -> Next {
    if conn.flush().await.is_ok() && keep_alive { Next::Keep } else { Next::Close }
}

impl Run<'_> {
    /// True if the engine's phase ends this run.
    fn interrupted(&self) -> bool {
        self.engine.phase() >= Phase::Aborting
    }

    /// The next choice that may give out a token now.
    fn ready(&mut self) -> Option<usize> {
        let count = self.choices.len();
        let ready = (0..count).map(|i| (self.cursor + i) % count).find(|&i| {
            let choice = &self.choices[i];
            choice.ticket.as_ref().is_some_and(|t| t.has_more_than(choice.generation.generated()))
        })?;
        self.cursor = ready + 1;
        Some(ready)
    }

    /// Waits for whatever comes first.
    async fn wait(&mut self) -> Wake {
        std::future::poll_fn(|cx| {
            self.waker.register(cx.waker());
            if self.interrupted() {
                return Poll::Ready(Wake::Interrupted);
            }
            if let Some(choice) = self.ready() {
                return Poll::Ready(Wake::Token(choice));
            }
            self.conn.poll_gone(cx).map(|()| Wake::Gone)
        })
        .await
    }

    /// Waits for the end of the peer or of the engine; tokens do not matter.
    async fn wait_for_the_end(&mut self) -> Wake {
        std::future::poll_fn(|cx| {
            self.waker.register(cx.waker());
            if self.interrupted() {
                return Poll::Ready(Wake::Interrupted);
            }
            self.conn.poll_gone(cx).map(|()| Wake::Gone)
        })
        .await
    }

    /// Counts of the whole request so far.
    fn usage(&self) -> Usage {
        Usage { prompt: self.prompt_tokens, completion: self.sent, cached: self.cached }
    }

    /// The peer went away.
    fn disconnected(&self) -> Next {
        self.engine.disconnects.fetch_add(1, Ordering::Relaxed);
        self.recorder.tokens(self.sent);
        self.recorder.end("disconnect");
        Next::Close
    }

    /// The error with which the engine's phase ends a run, or none if it ends by abort.
    fn interruption(&self) -> Option<ApiError> {
        let abort =
            self.engine.phase() == Phase::Aborting && self.engine.options.sim.sigterm == FaultKind::Abort;
        (!abort).then(ApiError::engine_dead)
    }

    /// Observes the request in the metrics at its end.
    fn observe_end(&self, reason: &str) {
        let metrics = &self.engine.metrics;
        let now = Instant::now();
        let first = self.clock.first.unwrap_or(now);
        let seconds = |from: Instant, to: Instant| to.saturating_duration_since(from).as_secs_f64();
        metrics.request_success.with_label_values(&[reason]).inc();
        metrics.request_generation_tokens.observe(self.sent as f64);
        metrics.e2e.observe(seconds(self.clock.arrived, now));
        metrics.decode_time.observe(seconds(first, now));
        if self.sent > 1 {
            metrics.time_per_output_token.observe(seconds(first, now) / (self.sent - 1) as f64);
        }
    }

    /// Observes prompt, queue and prefill once the first token is out: vLLM counts them then.
    fn observe_start(&mut self, choice: usize) {
        let metrics = &self.engine.metrics;
        metrics.request_prompt_tokens.observe(self.prompt_tokens as f64);
        metrics.prompt_tokens.inc_by(self.prompt_tokens);
        let Some(ticket) = &self.choices[choice].ticket else { return };
        if self.engine.options.prompt_tokens_details {
            self.cached = ticket.cached_tokens();
        }
        let waited_s = ticket.waited_us() as f64 / 1e6;
        let until_first_s = self.clock.arrived.elapsed().as_secs_f64();
        metrics.queue_time.observe(waited_s);
        metrics.prefill_time.observe((until_first_s - waited_s).max(0.0));
        metrics.inference_time.observe((until_first_s - waited_s).max(0.0));
        metrics.prompt_tokens_cached.inc_by(ticket.cached_tokens());
    }
}

impl Choice {
    /// Notes the block that a token just filled, if it did.
    fn note_block(&mut self) {
        let prefix = self.generation.prefix();
        if prefix.len().is_multiple_of(BLOCK_TOKENS) {
            self.blocks.push(prefix.hash());
        }
    }

    /// Gives the place in the batch back; its blocks stay in the prefix cache.
    fn end(&mut self) {
        if let Some(mut ticket) = self.ticket.take() {
            ticket.blocks = std::mem::take(&mut self.blocks);
        }
    }
}
