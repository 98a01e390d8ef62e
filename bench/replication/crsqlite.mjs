// cr-sqlite 0.16 as a peer: the same rounds as ours.py, asked for by lines of JSON on standard input.
//
// Started as `node crsqlite.mjs DIRECTORY`, where npm installed @vlcn.io/crsqlite-wasm. Databases are in
// memory, which spares it the file that the other side writes to. CPU time is that of the whole process.
import { readFileSync } from "node:fs";
import { join, resolve } from "node:path";
import { createInterface } from "node:readline";
import { pathToFileURL } from "node:url";

const modules = join(resolve(process.argv[2]), "node_modules", "@vlcn.io");
const load = (path) => import(pathToFileURL(join(modules, path)).href);
const { default: makeModule } = await load("crsqlite-wasm/dist/crsqlite.mjs");
const SQLite = await load("wa-sqlite/src/sqlite-api.js");
const wasmBinary = readFileSync(join(modules, "crsqlite-wasm/dist/crsqlite.wasm"));
const sqlite3 = SQLite.Factory(await makeModule({ wasmBinary }));

const COLUMNS = "c1, c2, c3, c4, c5, c6, c7, c8, c9";
const TABLE = `CREATE TABLE items (id INTEGER NOT NULL PRIMARY KEY, c1 TEXT NOT NULL DEFAULT '',
  c2 TEXT NOT NULL DEFAULT '', c3 TEXT NOT NULL DEFAULT '', c4 TEXT NOT NULL DEFAULT '',
  c5 INTEGER NOT NULL DEFAULT 0, c6 INTEGER NOT NULL DEFAULT 0, c7 REAL NOT NULL DEFAULT 0,
  c8 TEXT NOT NULL DEFAULT '', c9 TEXT)`;
const INSERT = `INSERT INTO items (id, ${COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)`;
const UPDATE = "UPDATE items SET (" + COLUMNS + ") = (?, ?, ?, ?, ?, ?, ?, ?, ?) WHERE id = ?";
const CHANGE = '"table", pk, cid, val, col_version, db_version, site_id, cl, seq';
const MERGE = `INSERT INTO crsql_changes (${CHANGE}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)`;
const READ = `SELECT ${CHANGE} FROM crsql_changes WHERE db_version > ? ORDER BY db_version, seq`;

// The same values as compute_row in ours.py.
const values = (i, g) => [
  `name-${i}-${g}`, `app-${i % 97}-${g}`, `ams-${g}`, `10.0.${i % 250}.7:${8080 + g}`,
  i * 7 + g, i + 1000 * g, i + g + 0.5, `${"x".repeat(40)}-${i}-${g}`, `${"started"}-${g}`,
];

class Database {
  static async open(replicated = true) {
    const self = new Database();
    self.handle = await sqlite3.open_v2(":memory:");
    self.prepared = new Map();
    await sqlite3.exec(self.handle, TABLE);
    if (replicated) await sqlite3.exec(self.handle, "SELECT crsql_as_crr('items')");
    return self;
  }

  async prepare(sql) {
    if (!this.prepared.has(sql)) {
      const text = sqlite3.str_new(this.handle, sql);
      this.prepared.set(sql, (await sqlite3.prepare_v2(this.handle, sqlite3.str_value(text))).stmt);
      sqlite3.str_finish(text);
    }
    return this.prepared.get(sql);
  }

  // Run one prepared statement over rows, `batch` rows a transaction.
  async write(sql, rows, batch) {
    const statement = await this.prepare(sql);
    const [begin, commit] = [await this.prepare("BEGIN IMMEDIATE"), await this.prepare("COMMIT")];
    for (let first = 0; first < rows.length; first += batch) {
      await this.run(begin);
      for (const row of rows.slice(first, first + batch)) {
        for (let i = 0; i < row.length; i++) sqlite3.bind(statement, i + 1, row[i]);
        await this.run(statement);
      }
      await this.run(commit);
    }
  }

  async run(statement) {
    await sqlite3.step(statement);
    await sqlite3.reset(statement);
  }

  async read(sql, ...bound) {
    const statement = await this.prepare(sql);
    bound.forEach((value, i) => sqlite3.bind(statement, i + 1, value));
    const rows = [];
    while ((await sqlite3.step(statement)) === SQLite.SQLITE_ROW) rows.push(sqlite3.row(statement));
    await sqlite3.reset(statement);
    return rows;
  }

  async one(sql) {
    return (await this.read(sql))[0][0];
  }

  content() {
    return this.read(`SELECT id, ${COLUMNS} FROM items ORDER BY id`).then(JSON.stringify);
  }

  async bytes() {
    await sqlite3.exec(this.handle, "VACUUM");
    return (await this.one("PRAGMA page_count")) * (await this.one("PRAGMA page_size"));
  }

  async close() {
    for (const statement of this.prepared.values()) await sqlite3.finalize(statement);
    await sqlite3.exec(this.handle, "SELECT crsql_finalize()");
    await sqlite3.close(this.handle);
  }
}

async function timed(work) {
  const before = process.cpuUsage();
  await work();
  const { user, system } = process.cpuUsage(before);
  return (user + system) / 1e6;
}

function expect(condition, what) {
  if (!condition) throw new Error(what);
}

async function round({ rows, batch, singles }) {
  const cpu = {};
  const inserts = Array.from({ length: rows }, (_, i) => [i + 1, ...values(i + 1, 0)]);
  const updates = Array.from({ length: rows }, (_, i) => [...values(i + 1, 1), i + 1]);
  const ones = Array.from({ length: singles }, (_, i) => [rows + i + 1, ...values(rows + i + 1, 0)]);

  const plain = await Database.open(false);
  cpu.plain = await timed(() => plain.write(INSERT, inserts, batch));
  const plainBytes = await plain.bytes();

  const source = await Database.open();
  cpu.local = await timed(() => source.write(INSERT, inserts, batch));
  const sourceBytes = await source.bytes();
  const old = await source.read(READ, 0);
  const first = await source.one("SELECT crsql_db_version()");
  await source.write(UPDATE, updates, batch);
  const fresh = await source.read(READ, first);
  const second = await source.one("SELECT crsql_db_version()");
  expect(old.length === rows * 9 && fresh.length === rows * 9, "changes of every cell");

  const target = await Database.open();
  cpu.empty = await timed(() => target.write(MERGE, old, batch * 9));
  cpu.duplicate = await timed(() => target.write(MERGE, old, batch * 9));
  cpu.overwrite = await timed(() => target.write(MERGE, fresh, batch * 9));
  cpu.stale = await timed(() => target.write(MERGE, old, batch * 9));

  cpu.local_single = await timed(() => source.write(INSERT, ones, 1));
  const single = await source.read(READ, second);
  cpu.single = await timed(() => target.write(MERGE, single, 9));
  expect((await source.content()) === (await target.content()), "source and target are equal");
  for (const database of [plain, source, target]) await database.close();
  return { cpu, bytes: { plain: plainBytes, replicated: sourceBytes } };
}

const { version } = JSON.parse(readFileSync(join(modules, "crsqlite-wasm/package.json"), "utf8"));
console.log(JSON.stringify({ crsqlite: version, sqlite: sqlite3.libversion(), node: process.version }));
for await (const line of createInterface({ input: process.stdin })) {
  console.log(JSON.stringify(await round(JSON.parse(line))));
}
