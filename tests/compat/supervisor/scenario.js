// An update by delta image as balena-supervisor 19 does it (src/lib/docker-utils.ts applyBalenaDelta), with its own tools.
//
//     node scenario.js SOCKET '{"base", "delta", "target", "targetId", "token", "username", "password", "orphan"}'
//
// Prints "ok WHAT" or "not ok WHAT: WHY" for each assertion.
'use strict';

const Docker = require('dockerode');
const { DockerProgress } = require('docker-progress');
const toolbelt = require('docker-toolbelt');

const [socketPath, json] = process.argv.slice(2);
const given = JSON.parse(json);
const docker = new Docker({ socketPath }); // no version: the supervisor's paths have none

function check(what, condition, why = '') {
  console.log(condition ? `ok ${what}` : `not ok ${what}: ${why}`);
}

async function pull(progress, name, authconfig) {
  const seen = [];
  await progress.pull(name, (event) => seen.push(event.percentage), { authconfig });
  return seen;
}

function rises(what, percentages) {
  const sorted = [...percentages].sort((a, b) => a - b);
  check(`${what}: the bar rises`, JSON.stringify(percentages) === JSON.stringify(sorted), percentages.join(' '));
  check(`${what}: the bar ends at 100`, percentages[percentages.length - 1] === 100, percentages.join(' '));
}

async function main() {
  check('the engine is known as balena-engine', await toolbelt.isBalenaEngine(docker));
  const progress = new DockerProgress({ docker });

  // The first release, in full, with a user's credentials.
  const { username, password } = given;
  const registry = given.base.split('/')[0];
  rises('full pull', await pull(progress, given.base, { username, password, serverAddress: registry }));
  const base = await docker.getImage(given.base).inspect();
  check('sizes allow a delta of version 3', base.Size >= 40 && base.VirtualSize >= 40, `${base.Size} ${base.VirtualSize}`);

  // A delta whose base is not here: an error in the stream, with balena-engine's words.
  try {
    await pull(progress, given.orphan, { registrytoken: given.token });
    check('an orphan is refused', false, 'it was accepted');
  } catch (error) {
    check('an orphan is refused in the stream', error.statusCode === undefined, error.statusCode);
    check('an orphan is refused by its base', /loading delta base image "sha256:/.test(error.message), error.message);
  }

  // The update.
  rises('delta pull', await pull(progress, given.delta, { registrytoken: given.token }));
  const { Id: id } = await docker.getImage(given.delta).inspect();
  check('the name of the delta is the target', id === given.targetId, id);
  const { registry: host, imageName, tagName } = await toolbelt.getRegistryAndName(given.target);
  await docker.getImage(id).tag({ repo: `${host}/${imageName}`, tag: tagName });
  await docker.getImage(given.delta).remove();
  const target = await docker.getImage(given.target).inspect();
  check('the target has its own name', target.Id === given.targetId, target.Id);
  check('the delta is gone', !(await docker.listImages({ all: true })).some((image) => image.Labels?.['io.resin.delta.base']));
  const container = await docker.createContainer({ Image: given.target, Cmd: ['cat', '/app/version'], Tty: true });
  const output = await container.attach({ stream: true, stdout: true, stderr: true });
  let text = '';
  output.on('data', (chunk) => { text += chunk; });
  await container.start();
  const { StatusCode: code } = await container.wait();
  await new Promise((resolve) => { if (output.readableEnded) resolve(); else { output.on('end', resolve); output.on('close', resolve); } });
  check('the target runs', code === 0 && text.trim() === '2', `${code} ${text}`);
  await container.remove();

  // And the other way: what a builder does.
  const percentages = [];
  const report = await progress.makeDeltaProgressReporter((event) => percentages.push(event.percentage));
  const stream = await toolbelt.createDelta(docker, { src: given.base, dest: given.target, t: 'made:1' });
  const made = await new Promise((resolve, reject) => {
    docker.modem.followProgress(stream, (failed, lines) => (failed ? reject(failed) : resolve(lines)), report);
  });
  rises('making a delta', percentages);
  const created = made.map((line) => line.status || '').find((status) => status.startsWith('Created delta: '));
  const image = await docker.getImage('made:1').inspect();
  check('the delta has the tag', created === `Created delta: ${image.Id}`, created);
  check('the delta names its base', image.Config.Labels['io.resin.delta.base'] === base.Id);
  await docker.getImage('made:1').remove();
}

main().catch((error) => {
  console.log(`not ok scenario: ${error.stack}`);
  process.exit(1);
});
