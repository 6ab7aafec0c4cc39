//! What does a control plane cost that tells many proxies of a large fleet, and how soon do they know?
//!
//! One control plane, a process of its own, with scripted agents (`fleet`) that register the endpoints, and subscribers over
//! real connections (`subscriber`) that take what they are told as proxies do. Then endpoints begin and end to drain through
//! the REST API, at a steady rate. Measured: from each call to its being in every subscriber's hands; the control plane's CPU
//! over the same time, less what the fleet costs at rest; its memory.
//!
//! Twice the fleet at the same rate of changes must cost the same: that is seen by running it twice. Agents, subscribers and
//! control plane share the machine, so the times are upper bounds; CPU is the control plane's own.

mod fleet;
mod options;
mod plane;
mod subscriber;

use std::{
    ffi::OsString,
    io::Write,
    process::ExitCode,
    sync::Arc,
    time::{Duration, Instant},
};

use clap::Parser;
use hdrhistogram::Histogram;
use tokio::{
    task::JoinSet,
    time::{MissedTickBehavior, interval, sleep},
};

pub use self::options::Options;
use self::{fleet::Fleet, plane::Plane, subscriber::Told};

/// Runs the command line `argv`, program name first: 0 done, 1 something broke, 2 usage.
pub fn main(argv: impl IntoIterator<Item = OsString>) -> ExitCode {
    let options = match Options::try_parse_from(argv) {
        Ok(options) => options,
        Err(e) => {
            // Help and version are errors to clap, with exit code 0.
            let code = u8::try_from(e.exit_code()).unwrap_or(2);
            return if e.print().is_ok() { ExitCode::from(code) } else { ExitCode::FAILURE };
        }
    };
    let ran = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|e| format!("cannot start the runtime: {e}"))
        .and_then(|runtime| runtime.block_on(run(&options)));
    let (text, code) = match ran {
        Ok(text) => (text, 0),
        Err(e) => (format!("penstock-bench-fanout: {e}\n"), 1),
    };
    let printed = std::io::stdout().lock().write_all(text.as_bytes()).is_ok();
    ExitCode::from(if printed { code } else { 1 })
}

/// Sets everything up, changes endpoints, and says what came out.
async fn run(options: &Options) -> Result<String, String> {
    let mut tasks = JoinSet::new();
    let plane = Plane::start(&options.controlplane, options).await?;
    let fleet = Fleet::start(options, &plane, &mut tasks).await?;
    say(&format!("{} endpoints in {} pools are registered", options.endpoints, options.pools));
    let told = Arc::new(Told::default());
    for number in 0..options.subscribers {
        let told = Arc::clone(&told);
        tasks.spawn(subscriber::run(plane.grpc.clone(), number, told));
    }
    let complete = || told.complete() >= options.subscribers as usize;
    until("every subscriber to know the fleet", &mut tasks, complete).await?;
    say(&format!("{} subscribers know them", options.subscribers));
    let memory_before = plane.memory()?;

    sleep(Duration::from_secs(2)).await;
    let rest = cpu_over(&plane, options.seconds.min(10.0)).await?;
    let (cpu, began) = (plane.cpu()?, Instant::now());
    let mut ticks = interval(Duration::from_secs_f64(60.0 / f64::from(options.updates_per_minute)));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut calls = JoinSet::new();
    let mut made = 0_u32;
    let mut rng = fastrand::Rng::with_seed(7);
    let mut drained = vec![false; fleet.ids.len()];
    while began.elapsed().as_secs_f64() < options.seconds {
        ticks.tick().await;
        // One that changes twice within a push would be seen once.
        let Some(slot) = free_slot(&mut rng, fleet.ids.len(), &told) else { continue };
        let (Some((pool, id)), Some(state)) = (fleet.ids.get(slot), drained.get_mut(slot)) else { continue };
        *state = !*state;
        told.expect(slot, pool, id, *state, options.subscribers);
        calls.spawn(plane::drain(plane.client.clone(), plane.http.clone(), id.clone(), *state));
        made += 1;
        while let Some(ended) = calls.try_join_next() {
            ended.map_err(|e| e.to_string())??;
        }
    }
    while let Some(ended) = calls.join_next().await {
        ended.map_err(|e| e.to_string())??;
    }
    until("every subscriber to know every change", &mut tasks, || told.outstanding() == 0).await?;
    let took = began.elapsed();
    let busy = plane.cpu()?.saturating_sub(cpu).as_secs_f64() / took.as_secs_f64();
    let memory = plane.memory()?;
    let pushes = plane.snapshots().await?;
    plane.stop().await?;
    let (each, all) = told.take();
    let per_update = (busy - rest) * took.as_secs_f64() * 1e3 / f64::from(made.max(1));
    let row = |name: &str, times: &Histogram<u64>| {
        let ms = |q: f64| times.value_at_quantile(q) as f64 / 1e3;
        format!("| {name} | {:.1} ms | {:.1} ms | {:.1} ms |\n", ms(0.5), ms(0.99), times.max() as f64 / 1e3)
    };
    Ok(format!(
        "{} endpoints in {} pools on {} nodes, {} subscribers, {:.0} changes a second for {:.0} s ({made} changes, {pushes} \
         snapshots in all)\n\n| from the call to | p50 | p99 | longest |\n|---|---|---|---|\n{}{}\nCPU of the control plane: \
         {:.0} % of a core at rest, {:.0} % with changes: {per_update:.2} ms for each change\nmemory of the control plane: \
         {} MiB before, {} MiB after\n",
        options.endpoints,
        options.pools,
        options.nodes,
        options.subscribers,
        f64::from(made) / took.as_secs_f64(),
        took.as_secs_f64(),
        row("a subscriber", &each),
        row("the last of them", &all),
        100.0 * rest,
        100.0 * busy,
        memory_before >> 20,
        memory >> 20,
    ))
}

/// An endpoint of which nothing is under way.
fn free_slot(rng: &mut fastrand::Rng, count: usize, told: &Told) -> Option<usize> {
    (0..16).map(|_| rng.usize(..count.max(1))).find(|slot| !told.is_expected(*slot))
}

/// Share of a core that the control plane uses for that many seconds.
async fn cpu_over(plane: &Plane, seconds: f64) -> Result<f64, String> {
    let (cpu, began) = (plane.cpu()?, Instant::now());
    sleep(Duration::from_secs_f64(seconds)).await;
    Ok(plane.cpu()?.saturating_sub(cpu).as_secs_f64() / began.elapsed().as_secs_f64())
}

/// Waits for that; a task that ends ends the wait.
async fn until(
    what: &str,
    tasks: &mut JoinSet<Result<(), String>>,
    holds: impl Fn() -> bool,
) -> Result<(), String> {
    let deadline = Instant::now() + Duration::from_secs(300);
    while !holds() {
        if let Some(ended) = tasks.try_join_next() {
            return Err(format!("waited for {what}, but a peer ended: {ended:?}"));
        }
        if Instant::now() > deadline {
            return Err(format!("waited in vain for {what}"));
        }
        sleep(Duration::from_millis(5)).await;
    }
    Ok(())
}

fn say(line: &str) {
    writeln!(std::io::stderr(), "{line}").unwrap_or_default();
}
