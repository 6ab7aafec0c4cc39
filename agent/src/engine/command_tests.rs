use penstock_config::agent::EnginesConfig;
use penstock_proto::engine::{EngineOptions, Share};

use super::*;

fn assignment() -> Assignment {
    Assignment {
        model: "org/llama".into(),
        replica_id: "org-llama-0".into(),
        generation: 7,
        spec: EngineSpec {
            engine: "vllm".into(),
            model_path: "/models/llama".into(),
            served_model_name: "org/llama".into(),
            args: vec!["--max-num-batched-tokens".into(), "8192".into()],
            env: BTreeMap::from([("VLLM_LOGGING_LEVEL".into(), "DEBUG".into())]),
            ..EngineSpec::default()
        },
        gpu_uuids: vec!["GPU-a".into(), "GPU-b".into()],
        asleep: false,
    }
}

fn place(gpus: GpuKind) -> Place<'static> {
    Place {
        host: "0.0.0.0",
        port: 10_815,
        kv_events_port: Some(10_816),
        rpc_port: Some(10_820),
        gpus,
        state_dir: "/state",
        longest_shutdown_s: 19,
        version: None,
    }
}

fn launch_at(
    place: Place<'_>,
    change: impl FnOnce(&mut Assignment),
) -> Result<(Launch, Vec<String>), SpecError> {
    let mut assignment = assignment();
    change(&mut assignment);
    launch(&EnginesConfig::default().programs, &assignment, place)
}

fn try_launch(change: impl FnOnce(&mut Assignment)) -> Result<Launch, SpecError> {
    launch_at(place(GpuKind::Nvml), change).map(|(launch, notes)| {
        assert_eq!(notes, Vec::<String>::new(), "the version is not known");
        launch
    })
}

fn refused(change: impl FnOnce(&mut Assignment)) -> String {
    try_launch(change).expect_err("must be refused").to_string()
}

fn env(launch: &Launch) -> Vec<String> {
    launch.env.iter().map(|(k, v)| format!("{k}={v}")).collect()
}

/// What every command line of these tests begins with.
const OURS: &str = "vllm serve /models/llama --host 0.0.0.0 --port 10815 --served-model-name org/llama";

#[test]
fn vllm_on_two_gpus() {
    let launch = try_launch(|_| {}).expect("valid");
    assert_eq!(launch.argv.join(" "), format!("{OURS} --shutdown-timeout 10 --max-num-batched-tokens 8192"));
    assert_eq!(
        env(&launch),
        [
            "CUDA_DEVICE_ORDER=PCI_BUS_ID",
            "CUDA_VISIBLE_DEVICES=GPU-a,GPU-b",
            "PENSTOCK_REPLICA=org-llama-0",
            "PENSTOCK_STATE_DIR=/state",
            "VLLM_LOGGING_LEVEL=DEBUG"
        ]
    );
    assert_eq!(launch.env_removed, ["PENSTOCK_SIM_GPUS"]);
}

#[test]
fn every_typed_field_has_its_option() {
    let launch = try_launch(|a| {
        a.spec.lora = vec![("sql".into(), "/loras/sql".into()), ("o/b".into(), "o/b-lora".into())];
        a.gpu_uuids = vec!["GPU-a".into(); 8];
        a.spec.options = EngineOptions {
            tensor_parallel: Some(2),
            pipeline_parallel: Some(2),
            data_parallel: Some(2),
            dtype: Some("bfloat16".into()),
            max_model_len: Some(8_192),
            gpu_memory_utilization: Share::try_from(0.85).ok(),
            quantization: Some("fp8".into()),
            max_num_seqs: Some(64),
            max_num_queued_reqs: Some(128),
            enable_prefix_caching: Some(true),
            max_lora_rank: Some(64),
            max_loras: Some(2),
            kv_events: Some(true),
            shutdown_timeout_s: Some(15),
            tokenizer: Some("org/t".into()),
            trust_remote_code: Some(true),
            seed: Some(-1),
            load_format: Some("dummy".into()),
            reasoning_parser: Some("qwen3".into()),
            tool_call_parser: Some("hermes".into()),
        };
    });
    let expected = "--enable-lora --lora-modules sql=/loras/sql o/b=o/b-lora --tensor-parallel-size 2 \
         --pipeline-parallel-size 2 --data-parallel-size 2 --dtype bfloat16 --max-model-len 8192 \
         --gpu-memory-utilization 0.85 --quantization fp8 --max-num-seqs 64 --max-num-queued-reqs 128 \
         --enable-prefix-caching --max-lora-rank 64 --max-loras 2 --kv-events-config \
         {\"enable_kv_cache_events\":true,\"publisher\":\"zmq\",\"endpoint\":\"tcp://*:10816\",\"topic\":\"kv-events\"} \
         --shutdown-timeout 15 --tokenizer org/t --trust-remote-code --seed=-1 --load-format dummy --reasoning-parser qwen3 \
         --enable-auto-tool-choice --tool-call-parser hermes --data-parallel-rpc-port 10820 --max-num-batched-tokens 8192";
    assert_eq!(launch.expect("valid").argv.join(" "), format!("{OURS} {expected}"));
}

#[test]
fn what_is_off_is_said_only_where_vllm_would_have_it_on() {
    let launch = try_launch(|a| {
        a.spec.args.clear();
        a.spec.options = EngineOptions {
            enable_prefix_caching: Some(false),
            trust_remote_code: Some(false),
            kv_events: Some(false),
            shutdown_timeout_s: Some(0),
            ..EngineOptions::default()
        };
    });
    assert_eq!(
        launch.expect("valid").argv.join(" "),
        format!("{OURS} --no-enable-prefix-caching --shutdown-timeout 0")
    );
}

#[test]
fn who_says_the_time_for_a_shutdown() {
    let line = |change: &dyn Fn(&mut BTreeMap<String, EngineProgram>, &mut Assignment)| {
        let (mut programs, mut assignment) = (EnginesConfig::default().programs, assignment());
        assignment.spec.args.clear();
        change(&mut programs, &mut assignment);
        let (launch, _) = launch(&programs, &assignment, place(GpuKind::None)).expect("valid");
        launch.argv.join(" ").strip_prefix(OURS).expect("ours").trim().to_owned()
    };
    let args = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
    let vllm = |programs: &mut BTreeMap<String, EngineProgram>, change: &dyn Fn(&mut EngineProgram)| {
        change(programs.get_mut("vllm").expect("there"));
    };
    assert_eq!(line(&|_, _| {}), "--shutdown-timeout 10", "the program's setting");
    assert_eq!(line(&|p, _| vllm(p, &|p| p.shutdown_timeout_s = 60)), "--shutdown-timeout 19", "what fits");
    assert_eq!(line(&|p, _| vllm(p, &|p| p.shutdown_timeout_s = 0)), "", "off");
    let in_args = line(&|p, _| vllm(p, &|p| p.args = args("--shutdown_timeout 3")));
    assert_eq!(in_args, "--shutdown_timeout 3", "the program's arguments, as settings of before have it");
    let both = line(&|p, a| {
        vllm(p, &|p| p.args = args("--shutdown-timeout 3"));
        a.spec.options.shutdown_timeout_s = Some(5);
    });
    assert_eq!(both, "--shutdown-timeout 3 --shutdown-timeout 5", "the later one counts");
    let said = line(&|_, a| a.spec.args = args("--shutdown-timeout=4"));
    assert_eq!(said, "--shutdown-timeout=4", "the deployment's arguments");
    let told = refused(|a| a.spec.options.shutdown_timeout_s = Some(20));
    assert!(told.contains("at most 19 fits") && told.contains("engines.term_ms"), "{told}");
}

#[test]
fn a_version_that_lacks_an_option_refuses_it_by_its_field_or_goes_without() {
    let old = || Place { version: Some(Version(0, 17, 0)), ..place(GpuKind::Nvml) };
    let (launch, notes) = launch_at(old(), |_| {}).expect("valid");
    assert_eq!(launch.argv.join(" "), format!("{OURS} --max-num-batched-tokens 8192"));
    assert!(notes.len() == 1 && notes[0].contains("--shutdown-timeout was left out"), "{notes:?}");
    for (change, field) in [
        ((|o| o.max_num_queued_reqs = Some(1)) as fn(&mut EngineOptions), "max_num_queued_reqs"),
        (|o| o.shutdown_timeout_s = Some(5), "shutdown_timeout_s"),
    ] {
        let told = launch_at(old(), |a| change(&mut a.spec.options)).expect_err(field).to_string();
        assert!(told.contains("vLLM 0.17.0 of this node has no") && told.contains(field), "{told}");
    }
    let told = launch_at(old(), |a| a.spec.args = vec!["--num-scheduler-steps=8".into()]).expect_err("gone");
    assert!(told.to_string().contains("0.10.1 no longer has it"), "{told}");
    let new = Place { version: Some(Version(0, 33, 0)), ..place(GpuKind::Nvml) };
    let (launch, notes) = launch_at(new, |a| a.spec.options.max_num_queued_reqs = Some(9)).expect("valid");
    assert!(launch.argv.contains(&"--max-num-queued-reqs".to_owned()) && notes.is_empty());
}

#[test]
fn the_simulator_on_simulated_gpus() {
    let mut programs = EnginesConfig::default().programs;
    programs.get_mut("sim").unwrap().command = vec!["/opt/penstock".into(), "engine-sim".into()];
    let mut assignment = assignment();
    assignment.spec = EngineSpec {
        engine: "sim".into(),
        model_path: "sim-model".into(),
        served_model_name: "m".into(),
        ..EngineSpec::default()
    };
    let (launch, _) = launch(&programs, &assignment, place(GpuKind::Simulated)).expect("valid");
    assert_eq!(
        launch.argv.join(" "),
        "/opt/penstock engine-sim serve sim-model --host 0.0.0.0 --port 10815 --served-model-name m"
    );
    assert_eq!(
        env(&launch),
        ["PENSTOCK_REPLICA=org-llama-0", "PENSTOCK_SIM_GPUS=GPU-a,GPU-b", "PENSTOCK_STATE_DIR=/state"]
    );
    assert_eq!(launch.env_removed, ["CUDA_VISIBLE_DEVICES"]);
}

#[test]
fn another_server_is_its_template() {
    let mut programs = EnginesConfig::default().programs;
    let words = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
    let program = EngineProgram {
        kind: "exec".into(),
        command: words("llama-server -m {model_path} --alias {served_model_name} --port {port}"),
        options: [("max_model_len".into(), words("--ctx-size {value}"))].into(),
        ..EngineProgram::default()
    };
    programs.insert("llama".into(), program);
    let mut assignment = assignment();
    assignment.spec.engine = "llama".into();
    assignment.spec.args = vec!["--mlock".into()];
    assignment.spec.options.max_model_len = Some(4_096);
    let (launch, _) = launch(&programs, &assignment, place(GpuKind::Nvml)).expect("valid");
    assert_eq!(
        launch.argv.join(" "),
        "llama-server -m /models/llama --alias org/llama --port 10815 --ctx-size 4096 --mlock"
    );
    assert_eq!(launch.env["CUDA_VISIBLE_DEVICES"], "GPU-a,GPU-b");
    assert_eq!(extra_ports(programs.get("llama"), &assignment.spec), ExtraPorts::default());
}

#[test]
fn an_engine_without_gpus_sees_none_on_a_node_that_has_some() {
    let launch = try_launch(|a| a.gpu_uuids.clear()).expect("valid");
    assert_eq!(launch.env["CUDA_VISIBLE_DEVICES"], "");
    let (cpu, _) = launch_at(place(GpuKind::None), |_| {}).expect("valid");
    assert!(!cpu.env.contains_key("CUDA_VISIBLE_DEVICES") && !cpu.env.contains_key("CUDA_DEVICE_ORDER"));
}

#[test]
fn the_deployments_environment_wins_over_the_programs() {
    let mut programs = EnginesConfig::default().programs;
    let theirs = [("A", "program"), ("VLLM_LOGGING_LEVEL", "INFO"), ("VLLM_HOST_IP", "10.0.0.1")];
    programs.get_mut("vllm").unwrap().env = theirs.map(|(k, v)| (k.into(), v.into())).into();
    let (launch, _) = launch(&programs, &assignment(), place(GpuKind::Nvml)).expect("valid");
    let value = |name: &str| launch.env[name].as_str();
    assert_eq!((value("A"), value("VLLM_LOGGING_LEVEL")), ("program", "DEBUG"));
    assert_eq!(value("VLLM_HOST_IP"), "10.0.0.1", "the node may say what a deployment may not");
}

#[test]
fn what_the_agent_decides_is_refused_in_every_spelling() {
    for arg in [
        "--port",
        "--port=1",
        "--por",
        "--host=::",
        "--served_model_name",
        "--uds=/x",
        "--config",
        "--",
        "-n",
    ] {
        let told = refused(|a| a.spec.args.push(arg.into()));
        assert!(told.contains(&format!("the argument \"{}", arg.split('=').next().unwrap())), "{told}");
    }
    for name in ["CUDA_VISIBLE_DEVICES", "PENSTOCK_REPLICA", "PENSTOCK_STATE_DIR", "VLLM_SERVER_DEV_MODE"] {
        let told = refused(|a| drop(a.spec.env.insert(name.into(), "x".into())));
        assert!(told.contains(name), "{told}");
    }
    for fine in ["--portable", "--host-cache=1", "-O3", "value", "--seed"] {
        try_launch(|a| a.spec.args.push(fine.into())).expect(fine);
    }
}

#[test]
fn a_field_and_an_argument_do_not_say_the_same_and_gpus_are_as_many_as_are_needed() {
    let told = refused(|a| {
        a.spec.options.max_model_len = Some(10);
        a.spec.args = vec!["--max_model_len=20".into()];
    });
    assert!(told.contains("\"--max_model_len\" says again what the field max_model_len says"), "{told}");
    let told = refused(|a| a.spec.options.tensor_parallel = Some(4));
    assert!(told.contains("tensor_parallel 4 needs 4 GPUs, and 2 are assigned"), "{told}");
    let told = refused(|a| a.spec.options.tokenizer = Some("--x".into()));
    assert!(told.contains("tokenizer is \"--x\""), "{told}");
}

#[test]
fn ports_are_asked_for_as_they_are_needed() {
    let ports = |options: EngineOptions| {
        let spec = EngineSpec { options, ..assignment().spec };
        extra_ports(EnginesConfig::default().programs.get("vllm"), &spec)
    };
    let on = EngineOptions { kv_events: Some(true), ..EngineOptions::default() };
    assert_eq!(ports(EngineOptions::default()), ExtraPorts::default());
    assert_eq!(ports(on.clone()), ExtraPorts { kv_events: 1, rpc: false });
    let ranks = EngineOptions { data_parallel: Some(4), ..on };
    assert_eq!(ports(ranks), ExtraPorts { kv_events: 4, rpc: true });
}

#[test]
fn an_unknown_engine_names_the_known_ones() {
    let told = refused(|a| a.spec.engine = "sglang".into());
    assert!(told.contains("engine \"sglang\" is not known on this node; known are: sim, vllm"), "{told}");
}

#[test]
fn values_that_would_become_options_or_cannot_be_passed_are_refused() {
    assert!(try_launch(|a| a.spec.model_path = "--trust-remote-code".into()).is_err());
    assert!(try_launch(|a| a.spec.model_path.clear()).is_err());
    assert!(try_launch(|a| a.spec.served_model_name.clear()).is_err());
    assert!(try_launch(|a| a.spec.args.push("a\0b".into())).is_err());
    assert!(try_launch(|a| drop(a.spec.env.insert("A=B".into(), String::new()))).is_err());
    for bad in [("", "p"), ("--x", "p"), ("n", "")] {
        try_launch(|a| a.spec.lora = vec![(bad.0.into(), bad.1.into())])
            .expect_err("neither empty nor an option");
    }
}
