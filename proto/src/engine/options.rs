//! The typed fields of a deployment, as values.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::fields;
use crate::v1;

/// A share above 0 and up to 1, in ten-thousandths: a figure that can be compared, unlike a float.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "f64", into = "f64")]
pub struct Share(u16);

impl Share {
    const WHOLE: f64 = 10_000.0;
}

impl TryFrom<f64> for Share {
    type Error = String;

    fn try_from(share: f64) -> Result<Self, String> {
        let scaled = (share * Self::WHOLE).round();
        if !(1.0..=Self::WHOLE).contains(&scaled) {
            return Err(format!("it must be a number above 0 and up to 1, not {share}"));
        }
        if (scaled - share * Self::WHOLE).abs() > 1e-6 {
            return Err(format!("it must have at most four decimals; it is {share}"));
        }
        #[allow(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "1 to 10000, checked above"
        )]
        Ok(Self(scaled as u16))
    }
}

impl From<Share> for f64 {
    fn from(share: Share) -> Self {
        Self::from(share.0) / Share::WHOLE
    }
}

impl fmt::Display for Share {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f64::from(*self).fmt(f)
    }
}

/// Declares the fields once: the struct, its two ways over the wire, and each set field's value in words.
macro_rules! engine_options {
    ($($(#[$doc:meta])* $name:ident: $type:ty,)*) => {
        /// The typed fields of a deployment. None: what the engine does by itself.
        #[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
        #[serde(default)]
        pub struct EngineOptions {
            $($(#[$doc])* #[serde(skip_serializing_if = "Option::is_none")] pub $name: Option<$type>,)*
        }

        impl EngineOptions {
            /// The fields that are set, by name, with their values in words; in the order of [`super::FIELDS`].
            pub fn given(&self) -> Vec<(&'static str, String)> {
                let mut given = Vec::new();
                $(if let Some(value) = &self.$name {
                    given.push((stringify!($name), value.to_string()));
                })*
                given
            }
        }

        impl From<&EngineOptions> for v1::EngineOptions {
            fn from(options: &EngineOptions) -> Self {
                Self { $($name: options.$name.clone().map(Into::into),)* }
            }
        }

        impl From<v1::EngineOptions> for EngineOptions {
            fn from(message: v1::EngineOptions) -> Self {
                // A value that cannot be one (a share of 7) counts as not given: a control plane never sends it.
                Self { $($name: message.$name.and_then(|value| value.try_into().ok()),)* }
            }
        }
    };
}

engine_options! {
    /// GPUs over which each layer is split.
    tensor_parallel: u32,
    /// Groups of GPUs, one behind the other, each with a part of the layers.
    pipeline_parallel: u32,
    /// Copies of the model inside one engine, behind one port.
    data_parallel: u32,
    /// Type of weights and activations.
    dtype: String,
    /// Tokens of prompt and answer together.
    max_model_len: u64,
    /// Share of each GPU's memory that it takes.
    gpu_memory_utilization: Share,
    /// How the weights are quantized.
    quantization: String,
    /// Sequences that it works on at once.
    max_num_seqs: u32,
    /// Requests that may wait in it; more are refused with 503, and go to another engine.
    max_num_queued_reqs: u32,
    /// Whether the KV cache of equal prefixes is shared.
    enable_prefix_caching: bool,
    /// The largest rank of its LoRA adapters.
    max_lora_rank: u32,
    /// LoRA adapters in one batch.
    max_loras: u32,
    /// Whether it publishes what its KV cache holds.
    kv_events: bool,
    /// Seconds that running requests get after SIGTERM.
    shutdown_timeout_s: u32,
    /// Folder or id of another tokenizer than the model's.
    tokenizer: String,
    /// Whether code that comes with the model is run.
    trust_remote_code: bool,
    /// Seed of its random numbers.
    seed: i64,
    /// How weights are loaded.
    load_format: String,
    /// Which parser takes the reasoning out of answers.
    reasoning_parser: String,
    /// Which parser takes tool calls out of answers.
    tool_call_parser: String,
}

impl EngineOptions {
    /// Nothing is set.
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// The GPUs that an engine's parallel sizes ask for, and how that comes about in words ("tensor_parallel 2 x
/// pipeline_parallel 2"); None: no typed field speaks of it. A size that only `args` say counts, too.
pub fn gpus_needed(options: &EngineOptions, args: &[String]) -> Option<(u64, String)> {
    let sizes = [
        ("tensor_parallel", options.tensor_parallel),
        ("pipeline_parallel", options.pipeline_parallel),
        ("data_parallel", options.data_parallel),
    ];
    sizes.iter().find(|(_, size)| size.is_some())?;
    let sizes = sizes.map(|(name, size)| {
        let said = || fields::field(name).and_then(|field| fields::value_in(args, field)?.parse().ok());
        (name, size.or_else(said).unwrap_or(1))
    });
    let product = sizes.iter().map(|(_, size)| u64::from(*size)).fold(1, u64::saturating_mul);
    let told: Vec<String> =
        sizes.iter().filter(|(_, n)| *n != 1).map(|(name, n)| format!("{name} {n}")).collect();
    let told = if told.is_empty() { "tensor_parallel 1".to_owned() } else { told.join(" x ") };
    Some((product, told))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all() -> EngineOptions {
        EngineOptions {
            tensor_parallel: Some(2),
            pipeline_parallel: Some(3),
            data_parallel: Some(1),
            dtype: Some("bfloat16".into()),
            max_model_len: Some(8_192),
            gpu_memory_utilization: Some(Share(9_000)),
            quantization: Some("fp8".into()),
            max_num_seqs: Some(64),
            max_num_queued_reqs: Some(128),
            enable_prefix_caching: Some(false),
            max_lora_rank: Some(64),
            max_loras: Some(4),
            kv_events: Some(true),
            shutdown_timeout_s: Some(10),
            tokenizer: Some("org/t".into()),
            trust_remote_code: Some(true),
            seed: Some(-1),
            load_format: Some("dummy".into()),
            reasoning_parser: Some("qwen3".into()),
            tool_call_parser: Some("hermes".into()),
        }
    }

    #[test]
    fn everything_survives_the_wire_and_nothing_set_is_nothing() {
        assert_eq!(EngineOptions::from(v1::EngineOptions::from(&all())), all());
        assert_eq!(v1::EngineOptions::from(&EngineOptions::default()), v1::EngineOptions::default());
        assert!(EngineOptions::from(v1::EngineOptions::default()).is_default());
        let odd = v1::EngineOptions { gpu_memory_utilization: Some(f64::NAN), ..Default::default() };
        assert!(EngineOptions::from(odd).is_default());
    }

    #[test]
    fn every_field_is_in_the_table_in_the_same_order() {
        let given: Vec<&str> = all().given().iter().map(|(name, _)| *name).collect();
        let table: Vec<&str> = super::super::FIELDS.iter().map(|field| field.name).collect();
        assert_eq!(given, table);
        assert_eq!(all().given()[5].1, "0.9");
    }

    #[test]
    fn a_share_is_above_nothing_and_up_to_all() {
        for (share, shown) in [(0.9, "0.9"), (1.0, "1"), (0.0001, "0.0001"), (0.85, "0.85")] {
            assert_eq!(Share::try_from(share).expect(shown).to_string(), shown);
        }
        for bad in [0.0, -0.5, 1.0001, f64::NAN, f64::INFINITY, 0.123_45] {
            Share::try_from(bad).expect_err("no share");
        }
    }

    #[test]
    fn gpus_come_from_typed_sizes_and_from_those_that_only_arguments_say() {
        let two = EngineOptions { tensor_parallel: Some(2), ..Default::default() };
        let args = |text: &str| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(gpus_needed(&EngineOptions::default(), &args("-tp 4")), None);
        assert_eq!(gpus_needed(&two, &[]), Some((2, "tensor_parallel 2".into())));
        for said in ["-pp 2", "--pipeline-parallel-size=2", "--pipeline_parallel_size 2"] {
            assert_eq!(
                gpus_needed(&two, &args(said)),
                Some((4, "tensor_parallel 2 x pipeline_parallel 2".into())),
                "{said}"
            );
        }
        assert_eq!(gpus_needed(&two, &args("-pp many")).map(|(n, _)| n), Some(2));
    }
}
