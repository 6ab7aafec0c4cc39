//! The command line: vLLM's `serve MODEL --flag ...`, plus the simulator's own `--sim-...` flags.
//!
//! Parsed by hand, not by clap, because the contract is argparse's as vLLM uses it: `--max_model_len` equals
//! `--max-model-len`, a list takes all words up to the next flag, hundreds of flags are accepted and ignored
//! ([`super::vllm_flags`]), and an unknown one is `error: unrecognized arguments` with exit code 2.

use std::{ffi::OsString, path::PathBuf};

use super::{
    batch::BatchSettings,
    faults::{Fault, FaultKind},
    sim_flags::{SIM_FLAGS, SimFlag},
    vllm_flags::{Arity, arity},
};

/// What to do.
#[derive(Debug)]
pub(super) enum Command {
    /// Serve a model.
    Serve(Box<Options>),
    /// Stand for EngineCore: standard input is the socket to the API server.
    EngineCore,
    /// Print this and exit 0.
    Print(String),
}

/// A usage error: printed in argparse's form, exit code 2.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("usage: {program} serve [model_tag] [options]\n{program} serve: error: {message}")]
pub(super) struct UsageError {
    program: String,
    message: String,
}

/// Everything `serve` needs.
#[derive(Debug, Clone)]
pub(super) struct Options {
    /// The model as given.
    pub model: String,
    /// Names it answers to; the first is the one it reports.
    pub served_names: Vec<String>,
    /// LoRA adapters: name and path.
    pub adapters: Vec<(String, String)>,
    /// Address to bind.
    pub host: String,
    /// Port; 0 = any free one.
    pub port: u16,
    /// Tokens of prompt and output together.
    pub max_model_len: u64,
    /// Sequences at once.
    pub max_num_seqs: usize,
    /// Sequences that may wait; none = any number.
    pub max_queued: Option<usize>,
    /// Seconds in-flight requests get after SIGTERM.
    pub shutdown_timeout_s: u64,
    /// Keys that open /v1 and /v2; empty = open.
    pub api_keys: Vec<String>,
    /// Report `cached_tokens`.
    pub prompt_tokens_details: bool,
    /// Echo `x-request-id` as a header.
    pub request_id_headers: bool,
    /// Usage on every stream and chunk, asked for or not.
    pub force_include_usage: bool,
    /// Accept `tools`.
    pub auto_tool_choice: bool,
    /// Count in /load.
    pub server_load_tracking: bool,
    /// The `--sim-` flags.
    pub sim: SimOptions,
}

/// The simulator's own settings; `--help` says what each is.
#[derive(Debug, Clone)]
pub(super) struct SimOptions {
    /// Time until the port opens, ms.
    pub load_ms: u64,
    /// Base of TTFT, ms.
    pub ttft_ms: f64,
    /// Prefill rate; 0 = at once.
    pub prefill_tokens_per_s: u64,
    /// Base of ITL, ms.
    pub itl_ms: f64,
    /// ITL per running sequence, µs.
    pub itl_growth_us: f64,
    /// Jitter of ITL, percent.
    pub jitter_percent: u64,
    /// Its seed.
    pub jitter_seed: u64,
    /// Divides all times; 0 = unthrottled.
    pub speed: f64,
    /// KV blocks of 16 tokens.
    pub kv_blocks: usize,
    /// Run the EngineCore process.
    pub core: bool,
    /// Events per write where several are due.
    pub burst: usize,
    /// Every so many events of a stream say when they were written; 0 = none.
    pub stamp: u64,
    /// Faults from the start.
    pub faults: Vec<Fault>,
    /// File for the bound address.
    pub announce: Option<PathBuf>,
    /// Open /sleep, /pause and the like.
    pub dev_mode: bool,
    /// What a SIGTERM without a timeout does to a stream.
    pub sigterm: FaultKind,
    /// Requests remembered for /sim/requests.
    pub records: usize,
    /// Compute SHA-256 of bodies for /sim/requests.
    pub sha256: bool,
    /// First tokens of chat answers that are reasoning.
    pub reasoning_tokens: u64,
    /// Tokens behind them that are the arguments of a tool call.
    pub tool_call_tokens: u64,
}

impl Default for SimOptions {
    fn default() -> Self {
        Self {
            load_ms: 200,
            ttft_ms: 10.0,
            prefill_tokens_per_s: 4_000_000,
            itl_ms: 5.0,
            itl_growth_us: 20.0,
            jitter_percent: 10,
            jitter_seed: 0,
            speed: 1.0,
            kv_blocks: 65_536,
            core: true,
            burst: 1,
            stamp: 0,
            faults: Vec::new(),
            announce: None,
            dev_mode: false,
            sigterm: FaultKind::Abort,
            records: 1024,
            sha256: false,
            reasoning_tokens: 0,
            tool_call_tokens: 0,
        }
    }
}

impl Default for Options {
    fn default() -> Self {
        Self {
            model: "sim-model".into(),
            served_names: Vec::new(),
            adapters: Vec::new(),
            host: "0.0.0.0".into(),
            port: 8000,
            max_model_len: 8 << 20,
            max_num_seqs: 1024,
            max_queued: None,
            shutdown_timeout_s: 0,
            api_keys: Vec::new(),
            prompt_tokens_details: false,
            request_id_headers: false,
            force_include_usage: false,
            auto_tool_choice: false,
            server_load_tracking: false,
            sim: SimOptions::default(),
        }
    }
}

impl Options {
    /// The name the engine reports for its model.
    pub(super) fn served_name(&self) -> &str {
        self.served_names.first().unwrap_or(&self.model)
    }

    /// True if the engine answers to `name`.
    pub(super) fn serves(&self, name: &str) -> bool {
        let served =
            if self.served_names.is_empty() { std::slice::from_ref(&self.model) } else { &self.served_names };
        served.iter().any(|n| n == name) || self.adapters.iter().any(|(n, _)| n == name)
    }

    /// The constants of the batching model.
    pub(super) fn batch_settings(&self) -> BatchSettings {
        let sim = &self.sim;
        let unthrottled = sim.speed == 0.0;
        let scaled = |value: f64, unit: f64| {
            // Flags are checked to be finite and at most a day.
            #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
            let units = (value * unit / if unthrottled { 1.0 } else { sim.speed }) as u64;
            units
        };
        BatchSettings {
            max_num_seqs: self.max_num_seqs,
            max_queued: self.max_queued,
            ttft_base_us: scaled(sim.ttft_ms, 1000.0),
            prefill_tokens_per_s: match sim.prefill_tokens_per_s {
                0 => 0,
                #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
                rate => ((rate as f64 * if unthrottled { 1.0 } else { sim.speed }) as u64).max(1),
            },
            itl_base_us: scaled(sim.itl_ms, 1000.0),
            itl_growth_ns: scaled(sim.itl_growth_us, 1000.0),
            jitter_percent: sim.jitter_percent,
            jitter_seed: sim.jitter_seed,
            unthrottled,
        }
    }

    /// Sets one of vLLM's flags that mean something here. Ok(false) if `name` is none of them.
    fn set(&mut self, name: &str, values: &[String]) -> Result<bool, String> {
        let one = || values.first().map_or("", String::as_str);
        match name {
            "model" => self.model = one().into(),
            "served-model-name" => self.served_names = values.to_vec(),
            "lora-modules" => {
                for module in values {
                    let (name, path) = module
                        .split_once('=')
                        .ok_or_else(|| format!("argument --lora-modules: `{module}` is not NAME=PATH"))?;
                    self.adapters.push((name.into(), path.into()));
                }
            }
            "host" => self.host = one().into(),
            "port" => self.port = number(name, one())?,
            "max-model-len" => self.max_model_len = length(one())?,
            "max-num-seqs" => self.max_num_seqs = number::<usize>(name, one())?.max(1),
            "max-num-queued-reqs" => self.max_queued = Some(number(name, one())?),
            "shutdown-timeout" => self.shutdown_timeout_s = number(name, one())?,
            "num-gpu-blocks-override" => self.sim.kv_blocks = number(name, one())?,
            "seed" => {
                // Known to be an integer; the tokens depend on nothing but the prefix.
                number::<i64>(name, one())?;
            }
            "api-key" => self.api_keys = values.to_vec(),
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// Turns one of vLLM's switches that mean something here. False if `name` is none of them.
    fn turn(&mut self, name: &str) -> bool {
        let (name, on) = name.strip_prefix("no-").map_or((name, true), |name| (name, false));
        match name {
            "enable-prompt-tokens-details" => self.prompt_tokens_details = on,
            "enable-request-id-headers" => self.request_id_headers = on,
            "enable-force-include-usage" => self.force_include_usage = on,
            "enable-auto-tool-choice" => self.auto_tool_choice = on,
            "enable-server-load-tracking" => self.server_load_tracking = on,
            _ => return false,
        }
        true
    }
}

fn number<T: std::str::FromStr>(flag: &str, value: &str) -> Result<T, String> {
    value.parse().map_err(|_| format!("argument --{flag}: invalid int value: '{value}'"))
}

/// A length as vLLM reads it: an integer, or one with k, m, g (decimal) or K, M, G (binary).
fn length(value: &str) -> Result<u64, String> {
    let (digits, unit) = match value.char_indices().last() {
        Some((at, 'k')) => (&value[..at], 1_000),
        Some((at, 'm')) => (&value[..at], 1_000_000),
        Some((at, 'g')) => (&value[..at], 1_000_000_000),
        Some((at, 'K')) => (&value[..at], 1 << 10),
        Some((at, 'M')) => (&value[..at], 1 << 20),
        Some((at, 'G')) => (&value[..at], 1 << 30),
        _ => (value, 1),
    };
    let length = digits.parse::<u64>().ok().and_then(|n| n.checked_mul(unit)).filter(|&n| n > 0);
    length.ok_or_else(|| format!("argument --max-model-len: invalid value: '{value}'"))
}

/// Parses a command line, program name first.
///
/// # Errors
/// [`UsageError`] for anything vLLM's parser would refuse.
pub(super) fn parse(argv: impl IntoIterator<Item = OsString>) -> Result<Command, UsageError> {
    let mut words = argv.into_iter().map(|w| w.to_string_lossy().into_owned());
    let program = words.next().unwrap_or_else(|| "penstock-engine-sim".into());
    let words: Vec<String> = words.collect();
    let fail = |message: String| UsageError { program: program.clone(), message };
    match words.first().map(String::as_str) {
        Some("serve") if words.iter().any(|w| w == "--help" || w == "-h") => {
            Ok(Command::Print(help(&program)))
        }
        Some("serve") => serve(&words[1..]).map(|o| Command::Serve(Box::new(o))).map_err(fail),
        Some("engine-core") => Ok(Command::EngineCore),
        Some("--version" | "-v") => Ok(Command::Print(format!("{}\n", super::VLLM_VERSION))),
        Some("--help" | "-h") => Ok(Command::Print(help(&program))),
        Some(other) => Err(fail(format!("invalid choice: '{other}' (choose from serve)"))),
        None => Err(fail("a command is required: serve".into())),
    }
}

fn serve(words: &[String]) -> Result<Options, String> {
    let mut options = Options::default();
    let mut unknown: Vec<String> = Vec::new();
    let mut at = 0;
    while let Some(word) = words.get(at) {
        at += 1;
        let Some(flag) = word.strip_prefix('-').filter(|f| !f.is_empty()) else {
            if at == 1 {
                options.model = word.clone()
            } else {
                unknown.push(word.clone())
            }
            continue;
        };
        let (name, inline) = match flag.split_once('=') {
            Some((name, value)) => (name, Some(value.to_string())),
            None => (flag, None),
        };
        let name = normal(name);
        if options.turn(&name) {
            continue;
        }
        let Some(arity) = known(&name) else {
            unknown.push(word.clone());
            continue;
        };
        let mut values: Vec<String> = inline.into_iter().collect();
        let wanted = match arity {
            Arity::Switch => 0,
            Arity::One => 1,
            Arity::Many => usize::MAX,
        };
        while values.len() < wanted {
            let Some(value) = words.get(at).filter(|w| !is_flag(w)) else { break };
            values.push(value.clone());
            at += 1;
        }
        if arity != Arity::Switch && values.is_empty() {
            return Err(format!(
                "argument --{name}: expected {}",
                if wanted == 1 { "one argument" } else { "at least one argument" }
            ));
        }
        if let Some(flag) = sim_flag(&name) {
            (flag.set)(&mut options.sim, values.first().map_or("", String::as_str))
                .map_err(|e| format!("argument --{name}: {e}"))?;
        } else {
            options.set(&name, &values)?;
        }
    }
    if !unknown.is_empty() {
        return Err(format!("unrecognized arguments: {}", unknown.join(" ")));
    }
    Ok(options)
}

/// A flag's name without dashes in front, and with `-` between its words.
fn normal(name: &str) -> String {
    let name = name.strip_prefix('-').unwrap_or(name);
    let (head, tail) = name.split_at(name.find('.').unwrap_or(name.len()));
    format!("{}{tail}", head.replace('_', "-"))
}

/// True for a word that opens a flag: not a lone dash, not a negative number.
fn is_flag(word: &str) -> bool {
    word.len() > 1 && word.starts_with('-') && word.parse::<f64>().is_err()
}

fn sim_flag(name: &str) -> Option<&'static SimFlag> {
    SIM_FLAGS.iter().find(|f| f.name == name)
}

fn known(name: &str) -> Option<Arity> {
    if let Some(flag) = sim_flag(name) {
        return Some(if flag.value.is_empty() { Arity::Switch } else { Arity::One });
    }
    match name {
        "served-model-name" | "lora-modules" | "api-key" => Some(Arity::Many),
        "model"
        | "host"
        | "port"
        | "max-model-len"
        | "max-num-seqs"
        | "max-num-queued-reqs"
        | "shutdown-timeout"
        | "num-gpu-blocks-override"
        | "seed" => Some(Arity::One),
        // -O3 and -O 3
        _ if name.len() == 2 && name.starts_with('O') => Some(Arity::Switch),
        _ => arity(name),
    }
}

fn help(program: &str) -> String {
    let mut text = format!(
        "usage: {program} serve [model_tag] [options]\n\nA stand-in for `vllm serve`: all of vLLM's flags are accepted; \
         these mean something:\n  --host --port --model --served-model-name --lora-modules --api-key --max-model-len \
         --max-num-seqs\n  --max-num-queued-reqs --shutdown-timeout --num-gpu-blocks-override \
         --enable-prompt-tokens-details\n  --enable-request-id-headers --enable-force-include-usage \
         --enable-auto-tool-choice --enable-server-load-tracking\n\nand these are its own:\n"
    );
    for flag in SIM_FLAGS {
        text.push_str(&format!("  {:<34} {}\n", format!("--{} {}", flag.name, flag.value), flag.help));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(line: &str) -> Result<Options, String> {
        let argv = ["sim"].into_iter().chain(line.split_whitespace()).map(OsString::from);
        match parse(argv) {
            Ok(Command::Serve(options)) => Ok(*options),
            Ok(other) => Err(format!("{other:?}")),
            Err(e) => Err(e.to_string()),
        }
    }

    #[test]
    fn takes_a_real_command_line() {
        let o = options(
            "serve meta-llama/Llama-3 --host 127.0.0.1 --port 10814 --served-model-name a b --max-model-len 32k \
             --tensor-parallel-size 2 --gpu-memory-utilization=0.9 --enforce-eager --no-enable-prefix-caching \
             --enable_prompt_tokens_details --shutdown-timeout 30 -tp 2 -O3 --compilation-config.mode 3 --seed -1 \
             --sim-itl-ms 2.5 --sim-fault reset:after_tokens=3",
        )
        .unwrap();
        assert_eq!(
            (o.host.as_str(), o.port, o.max_model_len, o.shutdown_timeout_s),
            ("127.0.0.1", 10814, 32_000, 30)
        );
        assert_eq!(o.served_names, ["a", "b"]);
        assert!(o.prompt_tokens_details && o.serves("b") && !o.serves("meta-llama/Llama-3"));
        assert_eq!(o.sim.faults[0].kind, FaultKind::Reset);
        assert_eq!(o.batch_settings().itl_base_us, 2_500);
    }

    #[test]
    fn refuses_as_argparse_does() {
        for (line, said) in [
            ("serve m --tensor-paralel-size 2", "unrecognized arguments: --tensor-paralel-size 2"),
            ("serve m --port x", "argument --port: invalid int value: 'x'"),
            ("serve m --port", "argument --port: expected one argument"),
            ("serve m --sim-fault explode", "explode"),
            ("serve m --sim-speed -1", "--sim-speed"),
            ("serve m --max-model-len 0", "--max-model-len"),
            ("run m", "invalid choice: 'run'"),
            ("", "a command is required"),
        ] {
            let error = options(line).unwrap_err();
            assert!(error.contains(said), "{line}: {error}");
        }
    }

    #[test]
    fn speed_divides_times_and_zero_frees() {
        let fast = options("serve m --sim-speed 10").unwrap().batch_settings();
        assert_eq!((fast.ttft_base_us, fast.itl_base_us, fast.unthrottled), (1_000, 500, false));
        assert!(options("serve m --sim-speed 0").unwrap().batch_settings().unthrottled);
    }

    #[test]
    fn every_own_flag_is_in_the_help() {
        let Ok(Command::Print(text)) = parse(["sim", "--help"].map(OsString::from)) else {
            panic!("no help")
        };
        assert!(SIM_FLAGS.iter().all(|f| text.contains(f.name)));
    }
}
