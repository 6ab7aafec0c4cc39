//! GPUs for development and drills, on machines that have none: the same each time, named after their node.

use penstock_config::agent::GpuConfig;
use penstock_proto::v1;

use super::Gpus;

/// Idle GPUs of one kind.
#[derive(Debug)]
pub(crate) struct Simulated {
    gpus: Vec<v1::Gpu>,
}

impl Simulated {
    /// As many as the settings say. Their uuids are unique in the fleet as far as node ids are.
    pub(crate) fn new(config: &GpuConfig, node_id: &str) -> Self {
        let gpu = |index| v1::Gpu {
            uuid: format!("SIM-{node_id}-{index}"),
            name: "Simulated GPU".into(),
            memory_total_mib: config.simulated_memory_mib,
            temperature_c: 30,
            ..v1::Gpu::default()
        };
        Self { gpus: (0..config.simulated_count).map(gpu).collect() }
    }
}

impl Gpus for Simulated {
    fn sample(&mut self) -> Result<Vec<v1::Gpu>, String> {
        Ok(self.gpus.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_nodes_have_no_uuid_in_common() {
        let config = GpuConfig { simulated_count: 2, ..GpuConfig::default() };
        let uuids = |node| {
            let gpus = Simulated::new(&config, node).sample().unwrap();
            gpus.into_iter().map(|g| g.uuid).collect::<Vec<_>>()
        };
        assert_eq!(uuids("a"), ["SIM-a-0", "SIM-a-1"]);
        assert!(uuids("b").iter().all(|uuid| !uuids("a").contains(uuid)));
    }
}
