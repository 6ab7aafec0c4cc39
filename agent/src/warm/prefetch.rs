//! Models on this node's disks before an engine needs them: once for each model, by the command of its engine's settings.
//!
//! A start whose model was not fetched yet fetches it first, and shows so; two replicas of a model share one fetch, since
//! the second waits for the first and then finds its mark. Models that operators want here ahead of any start
//! (`penstock prefetch`) are fetched by one task, one after the other, beside the starts: they never wait for it unless
//! they are for the same model.
//!
//! A mark per model (`STATE_DIR/prefetch/STEM.json`) says what was fetched by which command; removing it fetches anew.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    fs,
    path::PathBuf,
    pin::pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use nix::sys::signal::Signal;
use penstock_config::warm::{WarmConfig, filled};
use penstock_proto::v1;
use serde::{Deserialize, Serialize};
use tokio::{
    sync::{Semaphore, watch},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;

use super::{
    Way,
    disk::{self, Disk},
};
use crate::{
    assignment::EngineSpec,
    backoff::Backoff,
    engine::{
        command::{Launch, REPLICA_VARIABLE, STATE_DIR_VARIABLE},
        context::Context,
        logs,
        process::{Exit, Tree},
        stop,
    },
    state::{stem, write_atomically},
};

/// Lines of the command's output that explain its failure.
const REASON_LINES: usize = 3;
/// How often the disk is looked at.
const DISK: Duration = Duration::from_secs(10);
/// How often its progress is looked at.
const PROGRESS: Duration = Duration::from_secs(1);

/// A model that is wanted here ahead of any start.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Wish {
    model: String,
    spec: EngineSpec,
}

/// How far a wish is.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Status {
    state: &'static str,
    reason: String,
}

/// Hears how far a fetch is: "waiting" or "running", and a sentence.
pub(crate) type Told<'a> = &'a (dyn Fn(&'static str, &str) + Sync);

/// What was fetched.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Mark {
    model_path: String,
    command: Vec<String>,
}

/// Everything about fetches of this node.
#[derive(Debug)]
pub(crate) struct Prefetcher {
    slots: Semaphore,
    /// One at a time for each engine and model.
    busy: Mutex<BTreeMap<String, Arc<tokio::sync::Mutex<()>>>>,
    wishes: watch::Sender<Vec<Wish>>,
    statuses: Mutex<BTreeMap<String, Status>>,
    disk: Mutex<Option<Disk>>,
}

fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Prefetcher {
    /// Nothing is wished for yet.
    pub(crate) fn new(warm: &WarmConfig) -> Self {
        let parallel = usize::try_from(warm.prefetch_parallel).unwrap_or(1).clamp(1, 1_024);
        Self {
            slots: Semaphore::new(parallel),
            busy: Mutex::new(BTreeMap::new()),
            wishes: watch::Sender::new(Vec::new()),
            statuses: Mutex::new(BTreeMap::new()),
            disk: Mutex::new(None),
        }
    }

    /// The whole set that the control plane wishes for.
    pub(crate) fn wish(&self, message: v1::Prefetches) {
        let wish =
            |wish: v1::PrefetchWish| Wish { model: wish.model, spec: wish.spec.unwrap_or_default().into() };
        let wishes: Vec<Wish> = message.wishes.into_iter().map(wish).collect();
        self.wishes.send_if_modified(|now| {
            let changed = *now != wishes;
            *now = wishes;
            changed
        });
    }

    /// As reported.
    pub(crate) fn statuses(&self) -> Vec<v1::PrefetchStatus> {
        let statuses = lock(&self.statuses);
        let told = |(model, status): (&String, &Status)| v1::PrefetchStatus {
            model: model.clone(),
            state: status.state.into(),
            reason: status.reason.clone(),
        };
        statuses.iter().map(told).collect()
    }

    /// The disk of `warm.models_dir`, as last looked at.
    pub(crate) fn disk(&self) -> Option<Disk> {
        lock(&self.disk).clone()
    }

    fn note(&self, model: &str, state: &'static str, reason: &str) {
        lock(&self.statuses).insert(model.to_owned(), Status { state, reason: reason.to_owned() });
    }

    fn turn(&self, key: &str) -> Arc<tokio::sync::Mutex<()>> {
        let mut busy = lock(&self.busy);
        busy.retain(|_, turn| Arc::strong_count(turn) > 1);
        busy.entry(key.to_owned()).or_default().clone()
    }
}

/// Sees to it that the model is here before its engine starts. Whether this was the agent's to do.
///
/// # Errors
/// Why it is not here.
pub(crate) async fn before_start(
    cx: &Context,
    spec: &EngineSpec,
    cancel: &CancellationToken,
    told: Told<'_>,
) -> Result<bool, String> {
    let Some(fetch) = Fetch::of(cx, spec) else { return Ok(false) };
    let slots = Some(&cx.prefetch.slots);
    fetch.run(cx, spec, slots, cancel, told).await.map(|()| true)
}

/// One model by one command.
struct Fetch {
    argv: Vec<String>,
    timeout: Duration,
    /// Names it in files.
    stem: String,
    mark: PathBuf,
}

impl Fetch {
    /// None: there is nothing to do for the agent.
    fn of(cx: &Context, spec: &EngineSpec) -> Option<Self> {
        let program = cx.config.programs.get(&spec.engine)?;
        let prefetch = &program.prefetch;
        let off = spec.warm.prefetch.as_ref().is_some_and(|prefetch| prefetch.off);
        let folder = spec.model_path.starts_with('/') && disk::is_there("", &spec.model_path);
        if off || folder || prefetch.command.is_empty() || spec.model_path.starts_with('-') {
            return None;
        }
        let value = |name: &str| match name {
            "model" => Some(spec.served_model_name.clone()),
            "model_path" => Some(spec.model_path.clone()),
            "folder" => Some(cx.warm.models_dir.clone()),
            _ => None,
        };
        // Names that are not known were refused with the settings.
        let fill = |arg: &String| filled(arg, value).unwrap_or_else(|_| arg.clone());
        let stem = stem(&format!("{} {}", spec.engine, spec.model_path));
        Some(Self {
            argv: prefetch.command.iter().map(fill).collect(),
            timeout: Duration::from_secs(prefetch.timeout_s),
            mark: cx.state.prefetches().join(format!("{stem}.json")),
            stem,
        })
    }

    fn is_done(&self) -> bool {
        let mark = fs::read(&self.mark).ok().and_then(|bytes| serde_json::from_slice::<Mark>(&bytes).ok());
        mark.is_some_and(|mark| mark.command == self.argv)
    }

    /// Until it is here. `slots`: what bounds how many at a time.
    async fn run(
        &self,
        cx: &Context,
        spec: &EngineSpec,
        slots: Option<&Semaphore>,
        cancel: &CancellationToken,
        told: Told<'_>,
    ) -> Result<(), String> {
        let path = &spec.model_path;
        let cancelled = || format!("fetching {path} was cancelled");
        let turn = cx.prefetch.turn(&self.stem);
        if turn.try_lock().is_err() {
            told("waiting", &format!("waits for {path}, which is being fetched already"));
        }
        let _turn = cancel.run_until_cancelled(turn.lock()).await.ok_or_else(cancelled)?;
        if self.is_done() {
            return Ok(());
        }
        told("waiting", &format!("waits for its turn to fetch {path}"));
        let slot = async {
            match slots {
                Some(slots) => slots.acquire().await.ok(),
                None => None,
            }
        };
        let _slot = cancel.run_until_cancelled(slot).await.ok_or_else(cancelled)?;
        let backoff = Backoff::new(cx.config.backoff_min_ms, cx.config.backoff_max_ms);
        let tries = cx.warm.prefetch_tries;
        let mut failure = String::new();
        for n in 1..=tries {
            disk::before_fetch(&cx.warm, spec).await?;
            told("running", &format!("fetches {path} (try {n} of {tries}){failure}"));
            match self
                .once(cx, spec, cancel, &|line| {
                    told("running", &format!("fetches {path} (try {n} of {tries}): {line}"));
                })
                .await
            {
                Ok(()) => return self.note(path),
                Err(_) if cancel.is_cancelled() => return Err(cancelled()),
                Err(reason) => failure = format!("; the last try: {reason}"),
            }
            cx.metrics.warm_failed(Way::Prefetched);
            tracing::warn!(model_path = path, n, failure, "a model could not be fetched");
            let pause = tokio::time::sleep(backoff.pause(n, &mut fastrand::Rng::new()));
            if n < tries {
                cancel.run_until_cancelled(pause).await.ok_or_else(cancelled)?;
            }
        }
        Err(format!("{path} could not be fetched in {tries} tries{failure}"))
    }

    async fn once(
        &self,
        cx: &Context,
        spec: &EngineSpec,
        cancel: &CancellationToken,
        progress: &(dyn Fn(&str) + Sync),
    ) -> Result<(), String> {
        // No replica's log has this name, and what an agent that is killed leaves is found by it, and by the marks.
        let path = cx.state.logs().join(format!("%fetch-{}.log", self.stem));
        let opened = logs::open(&path, &format!("%fetch-{}", self.stem), &self.argv.join(" "));
        let log = opened.map_err(|e| format!("cannot open the log {}: {e}", path.display()))?;
        let mut env = spec.env.clone();
        env.insert(REPLICA_VARIABLE.into(), format!("%fetch-{}", self.stem));
        env.insert(STATE_DIR_VARIABLE.into(), cx.state.root().to_string_lossy().into_owned());
        let launch = Launch { argv: self.argv.clone(), env, env_removed: vec![] };
        let mut tree = Tree::spawn(&launch, log).map_err(|_| {
            format!("cannot execute {:?} (engines.{}.prefetch.command)", self.argv.first(), spec.engine)
        })?;
        let last = |lines: usize| logs::tail(&path, lines).join(" | ");
        let shown = async {
            loop {
                tokio::time::sleep(PROGRESS).await;
                progress(&last(1));
            }
        };
        let end = tokio::select! {
            exit = tree.exited() => match exit {
                Exit::Code(0) => Ok(()),
                exit => Err(format!("the command {exit}; last lines: {}", last(REASON_LINES))),
            },
            () = tokio::time::sleep(self.timeout) => Err(format!(
                "not done within {} s (engines.{}.prefetch.timeout_s)", self.timeout.as_secs(), spec.engine
            )),
            () = cancel.cancelled() => Err("cancelled".into()),
            never = shown => never,
        };
        let (term, give_up) = (cx.orphan_term(), Duration::from_millis(cx.config.kill_ms));
        let stuck = |left: String| tracing::error!(model_path = spec.model_path, "{left}");
        stop::put_down(&mut tree, term, give_up, &cx.hurry, &cx.metrics, stuck).await;
        tree.signal(Signal::SIGKILL);
        end
    }

    fn note(&self, model_path: &str) -> Result<(), String> {
        let mark = Mark { model_path: model_path.to_owned(), command: self.argv.clone() };
        let written = serde_json::to_vec_pretty(&mark).map_err(std::io::Error::from).and_then(|bytes| {
            self.mark.parent().map_or(Ok(()), fs::create_dir_all)?;
            write_atomically(&self.mark, &bytes)
        });
        if let Err(error) = written {
            // It is fetched anew once more, which finds everything there.
            tracing::error!(model_path, %error, "cannot note that a model was fetched");
        }
        tracing::info!(model_path, "model fetched");
        Ok(())
    }
}

/// Looks at the disk of `warm.models_dir` every now and then, for reports. Never returns.
async fn watch_disk(cx: &Context) -> Infallible {
    let mut ticks = tokio::time::interval(DISK);
    loop {
        ticks.tick().await;
        let folder = cx.warm.models_dir.clone();
        if folder.is_empty() {
            std::future::pending::<()>().await;
        }
        // A mount that hangs holds up nobody else.
        let looked = tokio::task::spawn_blocking(move || disk::look(&folder).ok()).await;
        *lock(&cx.prefetch.disk) = looked.ok().flatten();
    }
}

/// Fetches what is wished for, until `stop`. What is not wished for any more is left as it is, and no longer told of.
pub(crate) async fn ahead(cx: Arc<Context>, stop: CancellationToken) {
    let mut wishes = cx.prefetch.wishes.subscribe();
    let one = Arc::new(Semaphore::new(1));
    let mut running: BTreeMap<String, (Wish, CancellationToken)> = BTreeMap::new();
    let mut tasks: JoinSet<()> = JoinSet::new();
    let mut watched = pin!(watch_disk(&cx));
    loop {
        let wanted = wishes.borrow_and_update().clone();
        running.retain(|_, (wish, token)| {
            let kept = wanted.contains(wish);
            if !kept {
                token.cancel();
            }
            kept
        });
        lock(&cx.prefetch.statuses).retain(|model, _| wanted.iter().any(|wish| wish.model == *model));
        for wish in wanted {
            if running.contains_key(&wish.model) {
                continue;
            }
            let token = stop.child_token();
            running.insert(wish.model.clone(), (wish.clone(), token.clone()));
            tasks.spawn(keep(cx.clone(), wish, one.clone(), token));
        }
        tokio::select! {
            () = stop.cancelled() => break,
            changed = wishes.changed() => if changed.is_err() { break },
            Some(_) = tasks.join_next() => {}
            never = &mut watched => match never {},
        }
    }
    running.values().for_each(|(_, token)| token.cancel());
    while tasks.join_next().await.is_some() {}
}

/// One wish, until it is fulfilled or withdrawn.
async fn keep(cx: Arc<Context>, wish: Wish, one: Arc<Semaphore>, token: CancellationToken) {
    let model = wish.model.as_str();
    let Some(fetch) = Fetch::of(&cx, &wish.spec) else {
        cx.prefetch.note(model, "done", "nothing to fetch: it is a folder here, or no command is set");
        return;
    };
    let backoff = Backoff::new(cx.config.backoff_max_ms, cx.config.backoff_max_ms);
    let mut failures = 0_u32;
    loop {
        let told = |state: &'static str, text: &str| cx.prefetch.note(model, state, text);
        match fetch.run(&cx, &wish.spec, Some(&one), &token, &told).await {
            Ok(()) => return cx.prefetch.note(model, "done", ""),
            Err(_) if token.is_cancelled() => return,
            Err(reason) => cx.prefetch.note(model, "failed", &reason),
        }
        failures = failures.saturating_add(1);
        let pause = tokio::time::sleep(backoff.pause(failures, &mut fastrand::Rng::new()));
        if token.run_until_cancelled(pause).await.is_none() {
            return;
        }
    }
}
