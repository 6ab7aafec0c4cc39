//! Every route: the table of who may do what.
//!
//! A new route is a row here, with its schemas in `openapi/*.json`; nothing else has to know of it. A handler that
//! changes something takes an `Ask` (or the `Caller`) and writes through `edit` (or `Core::commit_audited`).

mod desired;
mod fleet;

use axum::{
    extract::DefaultBodyLimit,
    http::Method,
    routing::{delete, get, post},
};

use super::{
    audit, backup, cluster, console, observe, openapi,
    table::{ADMIN, Content, OPEN, OPERATOR, Row, VIEWER},
    tokens,
};

/// See the module's text.
pub(super) fn rows() -> Vec<Row> {
    let (mut rows, row) = (open(), Row::new);
    rows.extend(desired::rows());
    rows.extend(fleet::rows());
    rows.extend(process());
    rows.extend([
        row(
            VIEWER,
            Method::GET,
            "/api/v2/whoami",
            "whoami",
            "Whose token this is, and what it may do.",
            get(tokens::whoami),
        )
        .gives("Whoami"),
        row(
            ADMIN,
            Method::GET,
            "/api/v2/tokens",
            "list_tokens",
            "The tokens that were made.",
            get(tokens::list),
        )
        .paged()
        .gives("TokenList"),
        row(
            ADMIN,
            Method::POST,
            "/api/v2/tokens",
            "create_token",
            "Makes a token, which is shown this once.",
            post(tokens::create),
        )
        .body("TokenBody")
        .answers(201, Content::Json("NewToken"))
        .fails(&[409]),
        row(
            ADMIN,
            Method::DELETE,
            "/api/v2/tokens/{name}",
            "delete_token",
            "Withdraws a token.",
            delete(tokens::delete),
        )
        .named()
        .edits()
        .gives("Token"),
        row(
            ADMIN,
            Method::GET,
            "/api/v2/backup",
            "get_backup",
            "What is wanted of the site, in one document.",
            get(backup::get),
        )
        .gives("Backup"),
        row(
            ADMIN,
            Method::POST,
            "/api/v2/restore",
            "restore",
            "Makes the site what a backup says, as far as nothing that serves is torn down.",
            post(backup::restore).layer(DefaultBodyLimit::disable()),
        )
        .query(&["dry_run", "force", "only_missing", "without_placements"])
        .body("AnyBackup")
        .gives("Restored")
        .fails(&[409, 422]),
        row(
            VIEWER,
            Method::GET,
            "/api/v2/audit",
            "list_audit",
            "What operators changed, newest first.",
            get(audit::list),
        )
        .paged()
        .query(&["model", "actor", "kind"])
        .gives("AuditList"),
        row(
            VIEWER,
            Method::GET,
            "/api/audit-logs",
            "list_audit_logs",
            "The same as /api/v2/audit.",
            get(audit::list),
        )
        .paged()
        .query(&["model", "actor", "kind"])
        .gives("AuditList"),
        row(
            VIEWER,
            Method::GET,
            "/api/v2/audit/verify",
            "verify_audit",
            "Checks the chain of audit records.",
            get(audit::verify),
        )
        .query(&["number", "hash"])
        .gives("AuditVerdict"),
    ]);
    rows
}

fn open() -> Vec<Row> {
    let row = Row::new;
    vec![
        row(OPEN, Method::GET, "/", "console", "The console.", get(console::page)).sends("text/html"),
        row(OPEN, Method::GET, "/v1/admin/ui", "console_ui", "The console.", get(console::page))
            .sends("text/html"),
        row(
            OPEN,
            Method::GET,
            "/console/app.js",
            "console_script",
            "The console's script.",
            get(console::script),
        )
        .sends("text/javascript"),
        row(
            OPEN,
            Method::GET,
            "/console/style.css",
            "console_style",
            "The console's style.",
            get(console::style),
        )
        .sends("text/css"),
        row(OPEN, Method::GET, "/livez", "livez", "The process runs.", get(|| async { "ok" }))
            .sends("text/plain"),
        row(OPEN, Method::GET, "/healthz", "healthz", "The process runs.", get(|| async { "ok" }))
            .sends("text/plain"),
        row(
            OPEN,
            Method::GET,
            "/readyz",
            "readyz",
            "Whether the process should get work.",
            get(cluster::readyz),
        )
        .gives("Readiness")
        .answers(503, Content::Json("Readiness")),
        row(OPEN, Method::GET, "/metrics", "metrics", "Metrics for Prometheus.", get(cluster::metrics))
            .sends("text/plain"),
        row(OPEN, Method::GET, "/openapi.json", "openapi", "This document.", get(openapi::document))
            .sends("application/json"),
    ]
}

/// About the process that answers.
fn process() -> Vec<Row> {
    let row = Row::new;
    vec![
        row(
            VIEWER,
            Method::GET,
            "/api/v2/cluster/status",
            "cluster_status",
            "How this control plane stands.",
            get(cluster::status),
        )
        .gives("ClusterStatus"),
        row(
            OPERATOR,
            Method::POST,
            "/api/v2/cluster/publish",
            "publish_held",
            "Lets pass what is held back from proxies (publish_held of the cluster's status), on every control plane.",
            post(cluster::publish),
        )
        .edits()
        .gives("Published"),
        row(
            VIEWER,
            Method::GET,
            "/v1/admin/cluster/status",
            "admin_cluster_status",
            "The same as /api/v2/cluster/status.",
            get(cluster::status),
        )
        .gives("ClusterStatus"),
        row(
            VIEWER,
            Method::GET,
            "/api/v2/logs",
            "logs",
            "This process's last lines of log.",
            get(observe::logs),
        )
        .query(&["lines"])
        .gives("Logs"),
        row(
            VIEWER,
            Method::GET,
            "/v1/admin/logs",
            "admin_logs",
            "The same as /api/v2/logs.",
            get(observe::logs),
        )
        .query(&["lines"])
        .gives("Logs"),
        row(
            VIEWER,
            Method::GET,
            "/api/observe/metrics",
            "observe_metrics",
            "This process's metrics as JSON.",
            get(observe::metrics),
        )
        .gives("MetricsSummary"),
        row(
            VIEWER,
            Method::GET,
            "/api/observe/waiting",
            "observe_waiting",
            "What waits on what, by model.",
            get(observe::waiting),
        )
        .gives("Waiting"),
        row(
            VIEWER,
            Method::GET,
            "/api/observe/router",
            "observe_router",
            "How the proxy of observe.router_url does.",
            get(observe::router),
        )
        .named()
        .gives("RouterHealth"),
    ]
}
