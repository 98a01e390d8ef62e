-- The routing table: what every node holds, and what any SQLite client may read and write.
-- Each row has one writer where that is possible. What changes often (checks, loads) is kept
-- apart from what is large. Times are milliseconds since the epoch.

-- One running isthmus. Written by the node itself.
CREATE TABLE nodes (
    id TEXT NOT NULL PRIMARY KEY,
    region TEXT NOT NULL,
    address TEXT NOT NULL DEFAULT '',        -- host:port of its proxy, as other nodes reach it
    started_ms INTEGER NOT NULL DEFAULT 0,
    software TEXT NOT NULL DEFAULT '',       -- name and version
    peering TEXT NOT NULL DEFAULT '{}'       -- JSON object, see routing/peering.py
);

-- Regions of the operator's own; the usual codes are built in.
CREATE TABLE regions (
    code TEXT NOT NULL PRIMARY KEY,
    name TEXT NOT NULL DEFAULT '',
    latitude REAL NOT NULL,
    longitude REAL NOT NULL
);

-- Something served. Apps of one network may replay to each other.
CREATE TABLE apps (
    name TEXT NOT NULL PRIMARY KEY,
    network TEXT NOT NULL DEFAULT 'default',
    managed_by TEXT NOT NULL DEFAULT ''      -- 'config:<node>' when a configuration file declares it
);

-- What leads to an app: an exact name, '*.suffix' or '*', then the longest path prefix.
CREATE TABLE hostnames (
    hostname TEXT NOT NULL,
    path_prefix TEXT NOT NULL DEFAULT '/',
    app TEXT NOT NULL,
    managed_by TEXT NOT NULL DEFAULT '',
    PRIMARY KEY (hostname, path_prefix)
);

-- How an app is reached on one public port; port 0 serves any port without a service of its own.
CREATE TABLE services (
    app TEXT NOT NULL,
    port INTEGER NOT NULL DEFAULT 0,
    internal_port INTEGER,                   -- for machines whose address names no port
    concurrency TEXT NOT NULL DEFAULT 'requests',   -- 'requests' or 'connections'
    soft_limit INTEGER NOT NULL DEFAULT 20,
    hard_limit INTEGER,                      -- NULL: none
    checks TEXT NOT NULL DEFAULT '[]',       -- JSON list of check definitions
    managed_by TEXT NOT NULL DEFAULT '',
    options TEXT NOT NULL DEFAULT '{}',      -- JSON object, see routing/options.py
    PRIMARY KEY (app, port)
);

-- One instance of an app. Written by the node that owns it.
CREATE TABLE machines (
    id TEXT NOT NULL PRIMARY KEY,
    app TEXT NOT NULL,
    node TEXT NOT NULL,                      -- the node that owns and checks it
    region TEXT NOT NULL,
    address TEXT NOT NULL,                   -- host:port, or host alone
    state TEXT NOT NULL DEFAULT 'started',   -- started, stopped, suspended, draining, starting
    cordoned INTEGER NOT NULL DEFAULT 0,
    managed_by TEXT NOT NULL DEFAULT '',
    driver TEXT NOT NULL DEFAULT '',         -- what its node starts and stops it with; '': nothing does
    since_ms INTEGER NOT NULL DEFAULT 0,     -- when it came into its state
    problem TEXT NOT NULL DEFAULT '',        -- why it is not in the state that it should be in
    weight INTEGER NOT NULL DEFAULT 100,     -- 200: twice the requests of a machine with 100
    version INTEGER NOT NULL DEFAULT 0       -- of the release that its driver last started it with; 0: none
);

-- What somebody wants of a machine with a driver. Written by whoever wants it, carried out by its owner.
CREATE TABLE goals (
    machine TEXT NOT NULL PRIMARY KEY,
    state TEXT NOT NULL,                     -- started, stopped, suspended, draining
    asked_by TEXT NOT NULL DEFAULT '',       -- a node
    reason TEXT NOT NULL DEFAULT '',         -- command, request, load, idle
    asked_ms INTEGER NOT NULL DEFAULT 0,
    version INTEGER,                         -- of the release that it is to run; NULL: whichever it has
    release TEXT NOT NULL DEFAULT ''         -- what that release is called: a tag, an image
);

-- The last result of a probe, written when it changes.
CREATE TABLE checks (
    machine TEXT NOT NULL,
    name TEXT NOT NULL,
    node TEXT NOT NULL,                      -- who probed
    status TEXT NOT NULL,                    -- passing, warning, critical
    output TEXT NOT NULL DEFAULT '',
    updated_ms INTEGER NOT NULL DEFAULT 0,
    since_ms INTEGER NOT NULL DEFAULT 0,     -- when it came into its status
    PRIMARY KEY (machine, name)
);

-- What one node has in flight at one machine.
CREATE TABLE loads (
    machine TEXT NOT NULL,
    node TEXT NOT NULL,
    in_flight INTEGER NOT NULL DEFAULT 0,
    updated_ms INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (machine, node)
);
