-- What isthmus itself keeps beside the routing table. No worker reads it. Times are milliseconds since the
-- epoch.

-- One deploy of an app, and how far it is. Written by the node that conducts it.
CREATE TABLE releases (
    app TEXT NOT NULL,
    version INTEGER NOT NULL,
    created_ms INTEGER NOT NULL DEFAULT 0,
    created_by TEXT NOT NULL DEFAULT '',     -- who asked for it
    node TEXT NOT NULL DEFAULT '',           -- who conducts it
    release TEXT NOT NULL DEFAULT '',        -- what is deployed: a tag, an image
    strategy TEXT NOT NULL DEFAULT '',       -- rolling, canary, bluegreen
    status TEXT NOT NULL DEFAULT '',         -- running, rolling back, complete, rolled back, failed, abandoned
    problem TEXT NOT NULL DEFAULT '',        -- why it is not complete
    finished_ms INTEGER NOT NULL DEFAULT 0,  -- 0: it goes on
    machines TEXT NOT NULL DEFAULT '[]',     -- JSON list: those that serve once it is complete
    course TEXT NOT NULL DEFAULT '{}',       -- JSON object: what is done in which order, and where it is
    PRIMARY KEY (app, version)
);

-- A changeset that workers of a node did not survive: no node gives it to more workers. Written by that node,
-- removed by it when the change is gone, or by a person. See docs/staging.md.
CREATE TABLE quarantines (
    site TEXT NOT NULL,                      -- who wrote the changeset, in hex
    hlc INTEGER NOT NULL,                    -- and its hybrid time: together they name it
    node TEXT NOT NULL,                      -- who accuses it
    status TEXT NOT NULL DEFAULT 'suspect',  -- suspect: it is tried again; quarantined: it is not
    reason TEXT NOT NULL DEFAULT '',
    deaths INTEGER NOT NULL DEFAULT 0,
    since_ms INTEGER NOT NULL DEFAULT 0,
    what TEXT NOT NULL DEFAULT '[]',         -- JSON list of rows: table, then key
    PRIMARY KEY (site, hlc, node)
);

-- Settings or tables that all nodes are to take up, some of them first. Written where it is begun, and by
-- whoever finds out what becomes of it. See docs/rollouts.md.
CREATE TABLE rollouts (
    id TEXT NOT NULL PRIMARY KEY,
    kind TEXT NOT NULL DEFAULT '',           -- config, schema
    body TEXT NOT NULL DEFAULT '',           -- the settings as TOML, or the schema file
    steps TEXT NOT NULL DEFAULT '[]',        -- JSON list of lists of nodes: who takes it up with whom, in turn
    bake_ms INTEGER NOT NULL DEFAULT 0,      -- how long a step is watched
    status TEXT NOT NULL DEFAULT '',         -- running, done, back
    reason TEXT NOT NULL DEFAULT '',         -- why it went back
    node TEXT NOT NULL DEFAULT '',           -- where it was begun
    created_by TEXT NOT NULL DEFAULT '',     -- who asked for it
    created_ms INTEGER NOT NULL DEFAULT 0,
    finished_ms INTEGER NOT NULL DEFAULT 0   -- 0: it goes on
);

-- How it goes on one node. Written by that node alone.
CREATE TABLE rollout_reports (
    rollout TEXT NOT NULL,
    node TEXT NOT NULL,
    state TEXT NOT NULL DEFAULT '',          -- trying, good, failed, back
    detail TEXT NOT NULL DEFAULT '',
    at_ms INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (rollout, node)
);
