// dockerode against an engine: what balena's tools, written in Node, do all day.
//
//     node scenario.js SOCKET IMAGE REGISTRY NAMES...
//
// Prints "ok WHAT" or "not ok WHAT: WHY" for each assertion, grouped by scenario. Every scenario removes what it made.
'use strict';

const http = require('http');
const { PassThrough } = require('stream');
const { isDeepStrictEqual } = require('util');
const Docker = require('dockerode');

const [socketPath, image, registry, ...wanted] = process.argv.slice(2);
const docker = new Docker({ socketPath, version: 'v1.39' });
let failed = 0;
let current = '';

function check(what, condition, why) {
  if (!condition) failed += 1;
  console.log(condition ? `ok ${current}: ${what}` : `not ok ${current}: ${what}: ${why}`);
}

function same(what, actual, expected) {
  check(what, isDeepStrictEqual(actual, expected), `${JSON.stringify(actual)} is not ${JSON.stringify(expected)}`);
}

function match(what, actual, pattern) {
  check(what, pattern.test(String(actual)), `${JSON.stringify(actual)} does not match ${pattern}`);
}

async function refused(what, promise, status, pattern) {
  try {
    await promise;
    check(what, false, 'it was accepted');
  } catch (error) {
    same(`${what}: status`, error.statusCode, status);
    match(`${what}: message`, error.json ? error.json.message : error.message, pattern);
  }
}

const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

async function until(what, condition, seconds = 10) {
  const end = Date.now() + seconds * 1000;
  for (;;) {
    const value = await condition();
    if (value) return value;
    if (Date.now() > end) throw new Error(`not within ${seconds} s: ${what}`);
    await sleep(30);
  }
}

// Everything a stream gives until it ends.
function collect(stream) {
  return new Promise((resolve, reject) => {
    const chunks = [];
    stream.on('data', (chunk) => chunks.push(Buffer.from(chunk)));
    stream.on('end', () => resolve(Buffer.concat(chunks).toString()));
    stream.on('close', () => resolve(Buffer.concat(chunks).toString()));
    stream.on('error', reject);
  });
}

async function collectBytes(stream) {
  const chunks = [];
  for await (const chunk of stream) chunks.push(chunk);
  return Buffer.concat(chunks);
}

// Both sides of a multiplexed stream until it ends.
async function demux(stream) {
  const out = new PassThrough();
  const err = new PassThrough();
  const texts = Promise.all([collect(out), collect(err)]);
  docker.modem.demuxStream(stream, out, err);
  await new Promise((resolve) => {
    stream.on('end', resolve);
    stream.on('close', resolve);
  });
  out.end();
  err.end();
  return texts;
}

// The text of a `follow: false` log without its frames.
function text(buffer) {
  let rest = buffer;
  const parts = [];
  while (rest.length >= 8) {
    const length = rest.readUInt32BE(4);
    parts.push(rest.subarray(8, 8 + length).toString());
    rest = rest.subarray(8 + length);
  }
  return parts.join('');
}

function progress(stream) {
  return new Promise((resolve, reject) => {
    docker.modem.followProgress(stream, (error, lines) => (error ? reject(error) : resolve(lines)));
  });
}

const shell = (script) => ['sh', '-c', script];

async function start(options) {
  const container = await docker.createContainer({ Image: image, ...options });
  await container.start();
  return container;
}

// `docker.run` until both the container and its output have ended; the promise form waits for the container alone.
function run(command, output, options) {
  return new Promise((resolve, reject) => {
    let ended;
    const hub = docker.run(image, command, output, options, (error, result, container) => {
      if (error) reject(error);
      else ended.then(() => resolve([result, container]));
    });
    hub.on('stream', (stream) => {
      ended = new Promise((done) => stream.on('end', done));
    });
  });
}

const scenarios = {
  async system() {
    match('ping', await docker.ping(), /^OK$/);
    const version = await docker.version();
    same('os', version.Os, 'linux');
    same('least version', version.MinAPIVersion, '1.12');
    match('version of the API', version.ApiVersion, /^1\.(39|41)$/);
    const info = await docker.info();
    same('driver', info.Driver, 'overlay2');
    check('containers are counted', Number.isInteger(info.Containers), info.Containers);
    const usage = await docker.df();
    check('layers have a size', usage.LayersSize > 0, usage.LayersSize);
  },

  async images() {
    const lines = await progress(await docker.pull(image));
    match('pull begins', lines[0].status, /^Pulling from busybox$/);
    match('pull ends', lines[lines.length - 1].status, /^Status: (Image is up to date|Downloaded newer image) for /);
    const inspected = await docker.getImage(image).inspect();
    match('ID', inspected.Id, /^sha256:[0-9a-f]{64}$/);
    same('command', inspected.Config.Cmd, ['sh']);
    await docker.getImage(image).tag({ repo: 'node/copy', tag: 'two' });
    const listed = await docker.listImages({ filters: { reference: ['node/copy:two'] } });
    same('list by reference', listed.map((one) => one.Id), [inspected.Id]);
    const history = await docker.getImage('node/copy:two').history();
    same('history', history.map((one) => one.Id), [inspected.Id, '<missing>', '<missing>']);
    const removed = await docker.getImage('node/copy:two').remove();
    same('remove', removed, [{ Untagged: 'node/copy:two' }]);
    await refused('inspect of what is gone', docker.getImage('node/copy:two').inspect(), 404, /No such image: node\/copy:two/);
    await refused('a pull of nothing', docker.pull(`${registry}/nothing:1`), 404, /not found|access denied/);
  },

  async run() {
    const output = new PassThrough();
    const seen = collect(output);
    const [result, container] = await run(shell('echo out; echo err >&2; exit 7'), output, { Tty: true });
    output.end();
    same('status', result.StatusCode, 7);
    same('output on a terminal', await seen, 'out\r\nerr\r\n');
    await container.remove();
    const streams = [new PassThrough(), new PassThrough()];
    const texts = Promise.all(streams.map(collect));
    const options = { Tty: false, HostConfig: { AutoRemove: true } };
    const [second] = await run(shell('echo out; echo err >&2'), streams, options);
    streams.forEach((stream) => stream.end());
    same('status of the second', second.StatusCode, 0);
    same('outputs apart', await texts, ['out\n', 'err\n']);
    await until('auto remove', async () => (await docker.listContainers({ all: true })).length === 0);
  },

  async attach() {
    const container = await docker.createContainer({
      Image: image,
      Cmd: shell('echo ready; cat; echo end >&2'),
      OpenStdin: true,
      StdinOnce: true,
      AttachStdin: true,
    });
    const stream = await container.attach({ stream: true, hijack: true, stdin: true, stdout: true, stderr: true });
    const texts = demux(stream);
    await container.start();
    stream.write('through');
    stream.end();
    same('both outputs after a half close', await texts, ['ready\nthrough', 'end\n']);
    same('status', (await container.wait()).StatusCode, 0);
    await container.remove();

    const terminal = await docker.createContainer({ Image: image, Cmd: ['sh'], OpenStdin: true, Tty: true });
    const raw = await terminal.attach({ stream: true, hijack: true, stdin: true, stdout: true, stderr: true });
    await terminal.start();
    await terminal.resize({ h: 31, w: 97 });
    const answer = collect(raw);
    raw.write('stty size; exit 6\n');
    match('size of the terminal', await answer, /^31 97\r$/m);
    same('status of the shell', (await terminal.wait()).StatusCode, 6);
    await terminal.remove();
  },

  async exec() {
    const container = await start({ Cmd: ['sleep', '1000'], Env: ['COLOR=blue'] });
    const both = { AttachStdout: true, AttachStderr: true };
    let exec = await container.exec({ Cmd: shell('echo $COLOR; pwd >&2; exit 3'), WorkingDir: '/tmp', ...both });
    same('outputs', await demux(await exec.start({ hijack: true })), ['blue\n', '/tmp\n']);
    same('status', (await exec.inspect()).ExitCode, 3);
    exec = await container.exec({ Cmd: ['cat'], AttachStdin: true, User: 'nobody', ...both });
    const stream = await exec.start({ hijack: true, stdin: true });
    const texts = demux(stream);
    stream.end('typed');
    same('input', await texts, ['typed', '']);
    same('user', (await exec.inspect()).ProcessConfig.user, 'nobody');
    exec = await container.exec({ Cmd: ['tty'], Tty: true, ...both });
    match('terminal', await collect(await exec.start({ hijack: true, Tty: true })), /^\/dev\/pts\/\d+\r\n$/);
    await refused('exec in nothing', docker.getContainer('ghost').exec({ Cmd: ['true'] }), 404, /No such container: ghost/);
    await container.kill();
    await refused('exec in a stopped one', container.exec({ Cmd: ['true'] }), 409, /is not running/);
    await container.remove();
  },

  async logs() {
    const container = await start({ Cmd: shell('for n in 1 2 3; do echo $n; done; sleep 0.3; echo late; echo e >&2') });
    const follow = await container.logs({ follow: true, stdout: true, stderr: true });
    same('followed to the end', await demux(follow), ['1\n2\n3\nlate\n', 'e\n']);
    await container.wait();
    same('whole', text(await container.logs({ stdout: true })), '1\n2\n3\nlate\n');
    same('one stream', text(await container.logs({ stderr: true })), 'e\n');
    same('tail', text(await container.logs({ stdout: true, tail: 2 })), 'late\n');
    match('stamps', text(await container.logs({ stderr: true, timestamps: true })), /^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z e\n$/);
    await container.remove();
  },

  async life() {
    const container = await start({
      name: 'node-life',
      Cmd: shell('trap "exit 5" TERM; trap "echo usr" USR1; echo up; while :; do sleep 0.05; done'),
      Labels: { made: 'node' },
    });
    await until('up', async () => text(await container.logs({ stdout: true })) === 'up\n');
    await container.kill({ signal: 'SIGUSR1' });
    await until('the signal', async () => text(await container.logs({ stdout: true })) === 'up\nusr\n');
    const listed = await docker.listContainers({ filters: { label: ['made=node'] } });
    same('list', listed.map((one) => [one.Names[0], one.State]), [['/node-life', 'running']]);
    await container.pause();
    same('paused', (await container.inspect()).State.Status, 'paused');
    await container.unpause();
    const processes = await container.top({ ps_args: '-o pid,comm' });
    same('titles', processes.Titles, ['PID', 'COMMAND']);
    const stats = await container.stats({ stream: false });
    check('memory is measured', stats.memory_stats.usage > 0, JSON.stringify(stats.memory_stats));
    await container.update({ Memory: 32 << 20, MemorySwap: 64 << 20 });
    same('update', (await container.inspect()).HostConfig.Memory, 32 << 20);
    await refused('remove of a running one', container.remove(), 409, /remove/);
    await container.stop({ t: 5 });
    same('status of the stop', (await container.wait()).StatusCode, 5);
    await refused('stop of a stopped one', container.stop(), 304, /.*/);
    await container.rename({ name: 'node-renamed' });
    same('name', (await docker.getContainer('node-renamed').inspect()).Name, '/node-renamed');
    await container.restart({ t: 0 });
    same('runs again', (await container.inspect()).State.Running, true);
    await refused('a name in use', docker.createContainer({ Image: image, name: 'node-renamed' }), 409, /is already in use by container/);
    await container.remove({ force: true });
    await refused('inspect of what is gone', container.inspect(), 404, /No such container/);
  },

  async statuses() {
    const missing = await docker.createContainer({ Image: image, Cmd: ['no-such-command'] });
    await refused('a command that is not there', missing.start(), 400, /executable file not found in \$PATH/);
    same('exit code 127', (await missing.inspect()).State.ExitCode, 127);
    await missing.remove();
    const forbidden = await docker.createContainer({ Image: image, Cmd: ['/etc/passwd'] });
    await refused('a file that is no program', forbidden.start(), 400, /permission denied/);
    same('exit code 126', (await forbidden.inspect()).State.ExitCode, 126);
    await forbidden.remove();
    const killed = await start({ Cmd: ['sleep', '1000'] });
    const waiting = killed.wait();
    await sleep(100);
    await killed.kill({ signal: 'KILL' });
    same('exit code 137', (await waiting).StatusCode, 137);
    await killed.remove();
    const policy = { RestartPolicy: { Name: 'on-failure', MaximumRetryCount: 2 } };
    const failing = await start({ Cmd: ['false'], HostConfig: policy });
    const last = await until('two restarts', async () => {
      const value = await failing.inspect();
      return value.State.Status === 'exited' && value.RestartCount === 2 ? value : null;
    });
    same('exit code 1', last.State.ExitCode, 1);
    await failing.remove();
    await refused('no image', docker.createContainer({ Image: 'not/here:1' }), 404, /No such image: not\/here:1/);
  },

  async events() {
    const stream = await docker.getEvents({ filters: { type: ['container'], label: ['made=events'] } });
    const actions = [];
    const done = new Promise((resolve) => {
      let buffered = '';
      stream.on('data', (chunk) => {
        buffered += chunk;
        const lines = buffered.split('\n');
        buffered = lines.pop();
        for (const line of lines) actions.push(JSON.parse(line));
        if (actions.length >= 5) resolve();
      });
    });
    const container = await start({ Cmd: ['sleep', '1000'], Labels: { made: 'events' } });
    await container.kill();
    await container.remove();
    await done;
    stream.destroy();
    same('order', actions.map((event) => event.Action), ['create', 'start', 'kill', 'die', 'destroy']);
    same('status of the exit', actions[3].Actor.Attributes.exitCode, '137');
    same('actor', actions[0].Actor.ID, container.id);
  },

  async ports() {
    const container = await start({
      Cmd: shell('mkdir /w; echo served > /w/index.html; exec httpd -f -p 80 -h /w'),
      ExposedPorts: { '80/tcp': {} },
      HostConfig: { PortBindings: { '80/tcp': [{ HostIp: '127.0.0.1', HostPort: '' }] } },
    });
    const binding = (await container.inspect()).NetworkSettings.Ports['80/tcp'][0];
    same('address', binding.HostIp, '127.0.0.1');
    const fetch = () =>
      new Promise((resolve) => {
        http
          .get(`http://127.0.0.1:${binding.HostPort}/`, { agent: false }, (answer) => collect(answer).then(resolve))
          .on('error', () => resolve(null));
      });
    same('what it serves', await until('an answer', fetch), 'served\n');
    await container.remove({ force: true });
  },

  async volumes() {
    const volume = await docker.createVolume({ Name: 'node-store', Labels: { a: 'b' } });
    const binds = { Binds: ['node-store:/d'] };
    let container = await start({ Cmd: shell('echo kept > /d/file'), HostConfig: binds });
    await container.wait();
    await container.remove();
    container = await start({ Cmd: ['cat', '/d/file'], HostConfig: binds });
    await container.wait();
    same('content', text(await container.logs({ stdout: true })), 'kept\n');
    const mounts = (await container.inspect()).Mounts;
    same('mounts', mounts.map((one) => [one.Type, one.Name, one.Destination]), [['volume', 'node-store', '/d']]);
    const handle = docker.getVolume('node-store');
    same('labels', (await handle.inspect()).Labels, { a: 'b' });
    await refused('remove in use', handle.remove(), 409, /volume is in use/);
    await container.remove();
    await handle.remove();
    const left = (await docker.listVolumes()).Volumes.map((one) => one.Name);
    check('it is gone', !left.includes(volume.Name || 'node-store'), JSON.stringify(left));
  },

  async networks() {
    const network = await docker.createNetwork({ Name: 'node-net', Labels: { a: 'b' }, CheckDuplicate: true });
    await refused('a name twice', docker.createNetwork({ Name: 'node-net', CheckDuplicate: true }), 409, /already exists/);
    const server = await start({
      Cmd: shell('mkdir /w; echo served > /w/page; exec httpd -f -p 80 -h /w'),
      NetworkingConfig: { EndpointsConfig: { 'node-net': { Aliases: ['page-server'] } } },
      HostConfig: { NetworkMode: 'node-net' },
    });
    const client = await start({ Cmd: ['sleep', '1000'], HostConfig: { NetworkMode: 'none' } });
    await docker.getNetwork('none').disconnect({ Container: client.id, Force: true });
    await network.connect({ Container: client.id, EndpointConfig: { Aliases: ['asker'] } });
    const members = Object.keys((await network.inspect()).Containers);
    same('members', members.sort(), [client.id, server.id].sort());
    const fetch = 'until wget -q -O - http://page-server/page; do sleep 0.1; done';
    const exec = await client.exec({ Cmd: shell(fetch), AttachStdout: true, AttachStderr: true });
    const [out] = await demux(await exec.start({ hijack: true, stdin: false }));
    same('asked by its alias', out, 'served\n');
    await refused('remove in use', network.remove(), 403, /active endpoints/);
    await network.disconnect({ Container: client.id });
    await server.remove({ force: true });
    await client.remove({ force: true });
    await network.remove();
    const names = (await docker.listNetworks()).map((one) => one.Name);
    check('it is gone', !names.includes('node-net'), JSON.stringify(names));
  },

  async files() {
    const container = await start({ Cmd: ['sleep', '1000'] });
    const packed = await collectBytes(await container.getArchive({ path: '/etc/passwd' }));
    match('a file comes out', packed.toString('latin1'), /^passwd\0/);
    await container.putArchive(packed, { path: '/tmp' });
    const exec = await container.exec({ Cmd: shell('cmp /etc/passwd /tmp/passwd && echo same'), AttachStdout: true });
    const [out] = await demux(await exec.start({ hijack: true, stdin: false }));
    same('and goes in', out, 'same\n');
    const stat = await new Promise((resolve, reject) => {
      container.infoArchive({ path: '/etc/passwd' }, (error, answer) => (error ? reject(error) : resolve(answer)));
    });
    const header = stat.headers['x-docker-container-path-stat'];
    same('its stat', JSON.parse(Buffer.from(header, 'base64').toString()).name, 'passwd');
    await refused('nothing there', container.getArchive({ path: '/nothing' }), 404, /Could not find the file \/nothing/);
    const changed = (await container.changes()).map((one) => one.Path);
    check('changes', changed.includes('/tmp/passwd'), JSON.stringify(changed));
    await container.remove({ force: true });
  },

  async builds() {
    const follow = (stream) =>
      new Promise((resolve, reject) => {
        docker.modem.followProgress(stream, (error, lines) => (error ? reject(error) : resolve(lines)));
      });
    const container = await start({ Cmd: shell(`mkdir /c && printf 'FROM ${image}\\nCOPY a /a\\nRUN cat /a\\n' > /c/Dockerfile && echo inside > /c/a; sleep 1000`) });
    await until('the context', async () => (await container.changes() || []).some((one) => one.Path === '/c/a'));
    const context = await collectBytes(await container.getArchive({ path: '/c/.' }));
    const lines = await follow(await docker.buildImage(PassThrough.from([context]), { t: 'node/built:1', nocache: true }));
    const said = lines.map((line) => line.stream || '').join('');
    match('steps', said, /Step 3\/3 : RUN cat \/a\n/);
    match('output', said, /\ninside\n/);
    match('the end', said, /Successfully tagged node\/built:1\n$/);
    const id = lines.filter((line) => line.aux).pop().aux.ID;
    same('its ID', (await docker.getImage('node/built:1').inspect()).Id, id);
    const again = await follow(await docker.buildImage(PassThrough.from([context]), { t: 'node/built:1' }));
    same('from the cache', again.filter((line) => line.stream === ' ---> Using cache\n').length, 2);
    await container.remove({ force: true });
    await docker.getImage('node/built:1').remove();
  },
};

async function main() {
  for (const name of wanted.length ? wanted : Object.keys(scenarios)) {
    current = name;
    try {
      await scenarios[name]();
    } catch (error) {
      check('the scenario ends', false, (error && error.stack) || error);
    }
  }
  process.exit(failed ? 1 : 0);
}

main();
