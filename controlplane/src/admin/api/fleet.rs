//! Routes of what runs: places, replicas, nodes, proxies.

use axum::{
    http::Method,
    routing::{get, patch, post, put},
};

use super::super::{
    endpoints, logs, node_policies, nodes, placements, proxies,
    table::{OPERATOR, Row, VIEWER},
};

pub(super) fn rows() -> Vec<Row> {
    let row = Row::new;
    vec![
        row(
            VIEWER,
            Method::GET,
            "/api/v2/placements",
            "list_placements",
            "Where replicas have their places.",
            get(placements::list),
        )
        .paged()
        .gives("PlacementList"),
        row(
            VIEWER,
            Method::GET,
            "/api/v2/placements/{*model}",
            "get_placement",
            "Where one model's replicas have theirs.",
            get(placements::get),
        )
        .named()
        .conditional()
        .gives("Placement"),
        row(
            VIEWER,
            Method::GET,
            "/api/v2/endpoints",
            "list_endpoints",
            "Every replica and its state.",
            get(endpoints::list),
        )
        .paged()
        .gives("EndpointList"),
        row(
            VIEWER,
            Method::GET,
            "/api/v2/endpoints/{id}",
            "get_endpoint",
            "One replica.",
            get(endpoints::get),
        )
        .named()
        .gives("Endpoint"),
        row(
            OPERATOR,
            Method::POST,
            "/api/v2/endpoints/{id}/drain",
            "drain_endpoint",
            "Sends a replica nothing new, until it is undrained.",
            post(endpoints::drain),
        )
        .named()
        .edits()
        .query(&["move_streams"])
        .gives("Endpoint"),
        row(
            OPERATOR,
            Method::POST,
            "/api/v2/endpoints/{id}/undrain",
            "undrain_endpoint",
            "Undoes a drain. Streams that were not moved yet stay.",
            post(endpoints::undrain),
        )
        .named()
        .edits()
        .gives("Endpoint"),
        row(
            OPERATOR,
            Method::GET,
            "/api/v2/models/{model}/replicas/{id}/logs",
            "replica_logs",
            "A replica's log, from its node. It may hold what clients asked.",
            get(logs::of_replica),
        )
        .named()
        .query(&["lines", "follow", "previous"])
        .sends("text/plain")
        .fails(&[502]),
        row(VIEWER, Method::GET, "/api/v2/nodes", "list_nodes", "Every node and its GPUs.", get(nodes::list))
            .paged()
            .gives("NodeList"),
        row(VIEWER, Method::GET, "/api/v2/nodes/{id}", "get_node", "One node.", get(nodes::get))
            .named()
            .conditional()
            .gives("Node"),
        row(
            OPERATOR,
            Method::PUT,
            "/api/v2/nodes/{id}",
            "put_node",
            "Replaces everything that is said of a node.",
            put(node_policies::put),
        )
        .body("NodePolicyBody")
        .edits()
        .gives("NodeOrName"),
        row(
            OPERATOR,
            Method::PATCH,
            "/api/v2/nodes/{id}",
            "patch_node",
            "Sets a node's taints, labels, role and the models on its disks.",
            patch(node_policies::patch),
        )
        .body("NodeBody")
        .edits()
        .gives("NodeOrName"),
        row(
            OPERATOR,
            Method::POST,
            "/api/v2/nodes/{id}/cordon",
            "cordon_node",
            "Gives a node no new replicas.",
            post(node_policies::cordon),
        )
        .named()
        .may_have_body("ReasonBody")
        .edits()
        .gives("NodeOrName"),
        row(
            OPERATOR,
            Method::POST,
            "/api/v2/nodes/{id}/maintenance",
            "maintain_node",
            "Moves a node's replicas away.",
            post(node_policies::maintenance),
        )
        .named()
        .may_have_body("ReasonBody")
        .edits()
        .gives("NodeOrName"),
        row(
            OPERATOR,
            Method::POST,
            "/api/v2/nodes/{id}/prefetch",
            "prefetch_on_node",
            "Puts a deployed model among those that a node shall have on its disks, or takes it out.",
            post(node_policies::prefetch),
        )
        .named()
        .body("PrefetchBody")
        .edits()
        .gives("NodeOrName"),
        row(
            OPERATOR,
            Method::POST,
            "/api/v2/nodes/{id}/uncordon",
            "uncordon_node",
            "Undoes a cordon or a maintenance.",
            post(node_policies::uncordon),
        )
        .named()
        .edits()
        .gives("NodeOrName"),
        row(
            VIEWER,
            Method::GET,
            "/api/v2/proxies",
            "list_proxies",
            "The proxies that are connected, to whichever control plane.",
            get(proxies::proxies),
        )
        .paged()
        .gives("ProxyList"),
    ]
}
