//! Every series of the engine: vLLM's names and labels, so that what scrapes a real engine scrapes this one.
//!
//! Gauges and the counters of the batch are read at the scrape; the rest counts as it happens. Absent: `_created`
//! series, the Python process and garbage collector, speculative decoding.

use prometheus::{
    Encoder, Gauge, GaugeVec, Histogram, HistogramOpts, IntCounter, IntCounterVec, Opts, Registry,
    TextEncoder,
};

use super::{args::Options, generation::BLOCK_TOKENS, scheduler::Load};

/// All series, registered.
#[derive(Debug)]
pub(super) struct Metrics {
    registry: Registry,
    running: Gauge,
    waiting: Gauge,
    waiting_by_reason: GaugeVec,
    kv_used: Gauge,
    sleep_state: GaugeVec,
    preemptions: IntCounter,
    prefix_queries: IntCounter,
    prefix_hits: IntCounter,
    /// Prompt tokens of requests that have had their first token.
    pub(super) prompt_tokens: IntCounter,
    /// Of these, found in the cache.
    pub(super) prompt_tokens_cached: IntCounter,
    /// Generated tokens.
    pub(super) generation_tokens: IntCounter,
    /// Ended requests by reason.
    pub(super) request_success: IntCounterVec,
    /// Refused requests by reason.
    pub(super) admission_rejections: IntCounterVec,
    /// HTTP requests by route, method and status class.
    pub(super) http_requests: IntCounterVec,
    /// Seconds to the first token.
    pub(super) ttft: Histogram,
    /// Seconds between tokens.
    pub(super) inter_token: Histogram,
    /// Mean seconds per output token of a request.
    pub(super) time_per_output_token: Histogram,
    /// Seconds from arrival to end.
    pub(super) e2e: Histogram,
    /// Seconds in the queue.
    pub(super) queue_time: Histogram,
    /// Seconds from admission to the first token.
    pub(super) prefill_time: Histogram,
    /// Seconds from the first to the last token.
    pub(super) decode_time: Histogram,
    /// Seconds from admission to the end.
    pub(super) inference_time: Histogram,
    /// Prompt length.
    pub(super) request_prompt_tokens: Histogram,
    /// Output length.
    pub(super) request_generation_tokens: Histogram,
    /// `max_tokens` asked for.
    pub(super) request_max_tokens: Histogram,
    /// `n` asked for.
    pub(super) request_n: Histogram,
    /// Tokens released in one step.
    pub(super) iteration_tokens: Histogram,
}

/// vLLM's buckets: 1, 2, 5 and their tens up to the context length.
const LENGTHS: &[f64] =
    &[1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5];
/// vLLM's buckets for whole requests.
const REQUEST_SECONDS: &[f64] = &[
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0,
    960.0, 1920.0, 7680.0,
];
/// vLLM's buckets for the first token.
const FIRST_TOKEN_SECONDS: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
    80.0, 160.0, 640.0, 2560.0,
];
/// vLLM's buckets between tokens.
const TOKEN_SECONDS: &[f64] = &[
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
];
const STEP_TOKENS: &[f64] =
    &[1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0];
const CHOICES: &[f64] = &[1.0, 2.0, 5.0, 10.0, 20.0];

/// Registers series, each with the labels `engine` and `model_name`.
struct Maker<'a> {
    registry: Registry,
    model: &'a str,
}

impl Maker<'_> {
    fn opts(&self, name: &str, help: &str) -> Opts {
        let opts = Opts::new(format!("vllm:{name}"), help);
        let opts = opts.const_label("model_name", self.model);
        // The one series without an engine label in vLLM.
        if name.starts_with("admission_rejections") { opts } else { opts.const_label("engine", "0") }
    }

    fn add<C: prometheus::core::Collector + Clone + 'static>(&self, series: C) -> prometheus::Result<C> {
        self.registry.register(Box::new(series.clone()))?;
        Ok(series)
    }

    fn gauge(&self, name: &str, help: &str) -> prometheus::Result<Gauge> {
        self.add(Gauge::with_opts(self.opts(name, help))?)
    }

    fn gauges(&self, name: &str, help: &str, label: &str, values: &[&str]) -> prometheus::Result<GaugeVec> {
        let series = self.add(GaugeVec::new(self.opts(name, help), &[label])?)?;
        values.iter().for_each(|value| series.with_label_values(&[value]).set(0.0));
        Ok(series)
    }

    fn counter(&self, name: &str, help: &str) -> prometheus::Result<IntCounter> {
        self.add(IntCounter::with_opts(self.opts(name, help))?)
    }

    fn counters(
        &self,
        name: &str,
        help: &str,
        label: &str,
        values: &[&str],
    ) -> prometheus::Result<IntCounterVec> {
        let series = self.add(IntCounterVec::new(self.opts(name, help), &[label])?)?;
        values.iter().for_each(|value| series.with_label_values(&[value]).inc_by(0));
        Ok(series)
    }

    fn histogram(&self, name: &str, help: &str, buckets: &[f64]) -> prometheus::Result<Histogram> {
        let opts = HistogramOpts { common_opts: self.opts(name, help), buckets: buckets.to_vec() };
        self.add(Histogram::with_opts(opts)?)
    }
}

impl Metrics {
    /// Registers every series at zero.
    ///
    /// # Errors
    /// Only if two series had one name.
    pub(super) fn new(options: &Options) -> prometheus::Result<Self> {
        let make = Maker { registry: Registry::new(), model: options.served_name() };
        let cache_config = GaugeVec::new(
            make.opts("cache_config_info", "Information of the LLMEngine CacheConfig"),
            &["block_size", "num_gpu_blocks", "enable_prefix_caching"],
        )?;
        let (size, blocks) = (BLOCK_TOKENS.to_string(), options.sim.kv_blocks.to_string());
        make.add(cache_config)?.with_label_values(&[size.as_str(), blocks.as_str(), "True"]).set(1.0);
        let http_opts =
            Opts::new("http_requests_total", "Total number of requests by method, status and handler.");
        let http_requests = make.add(IntCounterVec::new(http_opts, &["handler", "method", "status"])?)?;
        let sleep_states = ["awake", "weights_offloaded", "discard_all"];
        let metrics = Self {
            running: make.gauge("num_requests_running", "Number of requests in model execution batches.")?,
            waiting: make.gauge("num_requests_waiting", "Number of requests waiting to be processed.")?,
            waiting_by_reason: make.gauges(
                "num_requests_waiting_by_reason",
                "Number of requests waiting, by reason.",
                "reason",
                &["capacity", "deferred"],
            )?,
            kv_used: make.gauge("kv_cache_usage_perc", "KV-cache usage. 1 means 100 percent usage.")?,
            sleep_state: make.gauges(
                "engine_sleep_state",
                "Engine sleep state.",
                "sleep_state",
                &sleep_states,
            )?,
            preemptions: make
                .counter("num_preemptions_total", "Cumulative number of preemption from the engine.")?,
            prefix_queries: make.counter("prefix_cache_queries_total", "Prefix cache queries, in tokens.")?,
            prefix_hits: make.counter("prefix_cache_hits_total", "Prefix cache hits, in tokens.")?,
            prompt_tokens: make.counter("prompt_tokens_total", "Number of prefill tokens processed.")?,
            prompt_tokens_cached: make
                .counter("prompt_tokens_cached_total", "Number of cached prompt tokens.")?,
            generation_tokens: make
                .counter("generation_tokens_total", "Number of generation tokens processed.")?,
            request_success: make.counters(
                "request_success_total",
                "Count of successfully processed requests.",
                "finished_reason",
                &["stop", "length", "abort", "error", "repetition"],
            )?,
            admission_rejections: make.counters(
                "admission_rejections_total",
                "Requests refused at admission.",
                "reason",
                &["max_num_queued_reqs", "max_num_queued_tokens"],
            )?,
            http_requests,
            ttft: make.histogram(
                "time_to_first_token_seconds",
                "Time to first token.",
                FIRST_TOKEN_SECONDS,
            )?,
            inter_token: make.histogram(
                "inter_token_latency_seconds",
                "Inter-token latency.",
                TOKEN_SECONDS,
            )?,
            time_per_output_token: make.histogram(
                "request_time_per_output_token_seconds",
                "Mean time per output token of a request.",
                TOKEN_SECONDS,
            )?,
            e2e: make.histogram(
                "e2e_request_latency_seconds",
                "End to end request latency.",
                REQUEST_SECONDS,
            )?,
            queue_time: make.histogram(
                "request_queue_time_seconds",
                "Time in WAITING phase.",
                REQUEST_SECONDS,
            )?,
            prefill_time: make.histogram(
                "request_prefill_time_seconds",
                "Time in PREFILL phase.",
                REQUEST_SECONDS,
            )?,
            decode_time: make.histogram(
                "request_decode_time_seconds",
                "Time in DECODE phase.",
                REQUEST_SECONDS,
            )?,
            inference_time: make.histogram(
                "request_inference_time_seconds",
                "Time in RUNNING phase.",
                REQUEST_SECONDS,
            )?,
            request_prompt_tokens: make.histogram(
                "request_prompt_tokens",
                "Prefill tokens per request.",
                LENGTHS,
            )?,
            request_generation_tokens: make.histogram(
                "request_generation_tokens",
                "Generation tokens per request.",
                LENGTHS,
            )?,
            request_max_tokens: make.histogram(
                "request_params_max_tokens",
                "The max_tokens parameter.",
                LENGTHS,
            )?,
            request_n: make.histogram("request_params_n", "The n parameter.", CHOICES)?,
            iteration_tokens: make.histogram(
                "iteration_tokens_total",
                "Tokens per engine step.",
                STEP_TOKENS,
            )?,
            registry: make.registry,
        };
        Ok(metrics)
    }

    /// The text of a scrape.
    ///
    /// # Errors
    /// Only if the text cannot be rendered.
    pub(super) fn render(&self, load: &Load, sleeping: bool) -> prometheus::Result<Vec<u8>> {
        self.running.set(load.running as f64);
        self.waiting.set(load.waiting as f64);
        self.waiting_by_reason.with_label_values(&["capacity"]).set(load.waiting as f64);
        self.kv_used.set(load.kv_used_ratio);
        self.sleep_state.with_label_values(&["awake"]).set(if sleeping { 0.0 } else { 1.0 });
        self.sleep_state.with_label_values(&["weights_offloaded"]).set(if sleeping { 1.0 } else { 0.0 });
        for (series, now) in [
            (&self.preemptions, load.preemptions),
            (&self.prefix_queries, load.prefix_queries),
            (&self.prefix_hits, load.prefix_hits),
        ] {
            series.inc_by(now.saturating_sub(series.get()));
        }
        let mut text = Vec::with_capacity(16 << 10);
        TextEncoder::new().encode(&self.registry.gather(), &mut text)?;
        Ok(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_labels_are_those_of_vllm() {
        let options = Options { served_names: vec!["m".into()], ..Options::default() };
        let load = Load {
            running: 3,
            waiting: 2,
            kv_used_ratio: 0.5,
            preemptions: 1,
            prefix_queries: 10,
            prefix_hits: 4,
            kv_blocks: 9,
        };
        let text = String::from_utf8(Metrics::new(&options).unwrap().render(&load, false).unwrap()).unwrap();
        for line in [
            "vllm:num_requests_running{engine=\"0\",model_name=\"m\"} 3",
            "vllm:kv_cache_usage_perc{engine=\"0\",model_name=\"m\"} 0.5",
            "vllm:prefix_cache_hits_total{engine=\"0\",model_name=\"m\"} 4",
            "vllm:generation_tokens_total{engine=\"0\",model_name=\"m\"} 0",
            "vllm:request_success_total{engine=\"0\",finished_reason=\"abort\",model_name=\"m\"} 0",
            "vllm:admission_rejections_total{model_name=\"m\",reason=\"max_num_queued_reqs\"} 0",
            "vllm:time_to_first_token_seconds_count{engine=\"0\",model_name=\"m\"} 0",
        ] {
            assert!(text.contains(line), "{line}\n{text}");
        }
    }
}
