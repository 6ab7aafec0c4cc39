//! A look at each member of etcd by itself, for people who ask how it does.

use std::time::Duration;

use etcd_client::{AlarmAction, AlarmType};
use penstock_config::controlplane::StoreConfig;

use super::link::connect;

/// One member, as it answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// The address that was asked.
    pub endpoint: String,
    /// What it says, or why it does not.
    pub says: Result<MemberSays, String>,
}

/// What a member says of itself and its cluster.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MemberSays {
    /// Its release.
    pub version: String,
    /// Its number.
    pub id: u64,
    /// The number of the one that leads; 0: none does.
    pub leader: u64,
    /// The size of its file, in bytes.
    pub db_bytes: u64,
    /// What is used of it, in bytes.
    pub used_bytes: u64,
    /// Alarms of the cluster, as etcd calls them.
    pub alarms: Vec<String>,
    /// Names of all members, those that are down too.
    pub members: Vec<String>,
}

/// Asks every member that the settings name, each for `store.member_timeout_ms` at most per question.
pub async fn look(settings: &StoreConfig) -> Vec<Member> {
    let mut seen = Vec::new();
    for endpoint in &settings.endpoints {
        // Three questions and a connection.
        let patience = Duration::from_millis(settings.member_timeout_ms.saturating_mul(2));
        let says = match tokio::time::timeout(patience, ask(settings, endpoint)).await {
            Ok(says) => says,
            Err(_) => Err(format!("no answer within {patience:?}")),
        };
        seen.push(Member { endpoint: endpoint.clone(), says });
    }
    seen
}

async fn ask(settings: &StoreConfig, endpoint: &str) -> Result<MemberSays, String> {
    let mut client = connect(settings, endpoint).await.map_err(|failure| failure.sentence)?;
    let status = client.status().await.map_err(|error| error.to_string())?;
    let bytes = |bytes: i64| u64::try_from(bytes).unwrap_or(0);
    let mut says = MemberSays {
        version: status.version().to_owned(),
        id: status.header().map_or(0, |header| header.member_id()),
        leader: status.leader(),
        db_bytes: bytes(status.db_size()),
        used_bytes: bytes(status.raft_used_db_size()),
        ..MemberSays::default()
    };
    // Without a leader neither is answered, and that is said already.
    if says.leader != 0 {
        let alarms =
            client.alarm(AlarmAction::Get, AlarmType::None, None).await.map_err(|e| e.to_string())?;
        says.alarms = alarms.alarms().iter().map(|alarm| format!("{:?}", alarm.alarm())).collect();
        let list = client.member_list().await.map_err(|e| e.to_string())?;
        says.members = list.members().iter().map(|member| member.name().to_owned()).collect();
    }
    Ok(says)
}
