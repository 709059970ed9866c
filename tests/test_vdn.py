"""What the script for teams alone has: JaxMARL's environments, the mixed loss, availability."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import teams
from conftest import ROLLOUTS
from hypothesis import given, settings
from hypothesis import strategies as st

import pqn_vdn_jaxmarl as vdn

teams.register(vdn)
GREEDY = jax.jit(vdn.available_epsilon_greedy)
apply_gru = jax.jit(vdn.GRU(5).apply)


@given(seed=st.integers(0, 99), epsilon=st.sampled_from([0.0, 0.3, 1.0]))
@settings(max_examples=30, deadline=None)
def test_only_available_actions(seed, epsilon):
    """Greedy or, with probability epsilon, any of the available ones, each as often."""
    rng = np.random.default_rng(seed)
    q, available = rng.normal(size=4).astype(np.float32), rng.random(4) < 0.5
    available[rng.integers(4)] = True
    q[~available] += 10
    actions = GREEDY(
        jax.random.key(seed), *np.broadcast_arrays(q, available, np.zeros((9999, 1)))[:2], epsilon
    )
    shares = np.bincount(actions, minlength=4) / 9999
    expected = epsilon * available / available.sum()
    expected[np.where(available, q, -np.inf).argmax()] += 1 - epsilon
    np.testing.assert_allclose(shares, expected, atol=0.03)
    assert not shares[~available].any()


def test_gru_against_flax():
    """flax's cell with its parameters put together, and a state that clear zeroes."""
    import flax.linen as nn

    x, first = jax.random.normal(jax.random.key(0), (9, 4, 3)), jnp.ones((4, 5))
    clear = jax.random.uniform(jax.random.key(3), (9, 4)) < 0.3
    params = vdn.GRU(5).init(jax.random.key(1), first, x, clear)["params"]
    params["Dense_0"]["bias"] += jax.random.normal(jax.random.key(2), (15,))
    params["bias"] += 1
    kernels = jnp.split(params["Dense_0"]["kernel"], 3, axis=1)
    biases = jnp.split(params["Dense_0"]["bias"], 3)
    recurrent = jnp.split(params["kernel"], 3, axis=1)
    theirs = {
        f"i{gate}": {"kernel": kernel, "bias": bias}
        for gate, kernel, bias in zip("rzn", kernels, biases, strict=True)
    }
    theirs |= {
        f"h{gate}": {"kernel": kernel} for gate, kernel in zip("rzn", recurrent, strict=True)
    }
    theirs["hn"]["bias"] = params["bias"]
    last, ours = apply_gru({"params": params}, first, x, clear)
    carry, cell = first, jax.jit(nn.GRUCell(5).apply)
    for t in range(9):
        carry, _ = cell({"params": theirs}, jnp.where(clear[t, :, None], 0, carry), x[t])
        np.testing.assert_allclose(ours[t], carry, atol=1e-5)
    np.testing.assert_allclose(last, carry, atol=1e-5)


@pytest.mark.parametrize("network, shape", [("gru", (7,)), ("mlp", (4, 5, 2)), ("cnn", (4, 5, 2))])
def test_permuted_agents_have_permuted_values(network, shape):
    sizes = {"hidden_size": 8, "num_channels": 3, "norm_input": "none"}
    config = vdn.Config(env_id="overcooked_clock", network=network, **sizes)
    net = vdn.QNetwork(6, config)
    features = jax.random.normal(jax.random.key(0), (2, 4, *shape))
    hidden, clear = jax.random.normal(jax.random.key(1), (4, 8)), jnp.zeros((2, 4), bool)
    variables = net.init(jax.random.key(2), hidden, features, clear)
    order = jnp.array([2, 0, 3, 1])
    _, q = net.apply(variables, hidden, features, clear)
    _, permuted = net.apply(variables, hidden[order], features[:, order], clear)
    np.testing.assert_allclose(permuted, q[:, order], atol=1e-6)
    assert (jnp.abs(q[:, :1] - q[:, 1:]) > 1e-4).all()


def test_convolutions_against_flax():
    """flax's convolutions with zero padding, from the same parameters."""
    import flax.linen as nn

    sizes = {"hidden_size": 8, "num_channels": 3, "num_layers": 1}
    net = vdn.QNetwork(6, vdn.Config(env_id="overcooked_clock", **sizes))
    image, clear = jax.random.normal(jax.random.key(0), (1, 2, 4, 5, 2)), jnp.zeros((1, 2), bool)
    variables = net.init(jax.random.key(1), None, image, clear)
    _, q = net.apply(variables, None, image, clear)
    params, x = variables["params"], image
    for i, size in enumerate((5, 3, 3)):
        dense = params[f"Dense_{i}"]
        conv = {"kernel": dense["kernel"].reshape(size, size, -1, 3), "bias": dense["bias"]}
        x = nn.Conv(3, (size, size)).apply({"params": conv}, x)
        x = nn.relu(nn.LayerNorm().apply({"params": params[f"LayerNorm_{i}"]}, x))
    x = nn.Dense(8).apply({"params": params["Dense_3"]}, x.reshape(1, 2, -1))
    x = nn.relu(nn.LayerNorm().apply({"params": params["LayerNorm_3"]}, x))
    np.testing.assert_allclose(nn.Dense(6).apply({"params": params["Dense_4"]}, x), q, atol=1e-5)


def slow_loss(config, state):
    """Loss and mean value of the second update, step by step and agent by agent, in NumPy."""
    _, step, env = vdn.make_env(config.env_id)
    network = vdn.QNetwork(env.action_space("").n, config)
    apply, step = jax.jit(network.apply), jax.jit(jax.vmap(step))
    obs, env_state, hidden = state.obs, state.env_state, state.hidden
    rows = []
    for t in range(2 * config.num_steps + 1):
        number, step_number = divmod(t, config.num_steps)
        collect_key = jax.random.split(jax.random.fold_in(state.key, number), 3)[0]
        keys = jax.random.split(collect_key, (config.num_steps, 2))[step_number]
        decayed = min(number / (config.epsilon_decay * config.num_updates), 1)
        epsilon = config.epsilon_start + (config.epsilon_finish - config.epsilon_start) * decayed
        shaping = max(1 - number / (config.shaping_decay * config.num_updates), 0)
        outputs = [
            apply(
                state.variables,
                None if hidden is None else hidden[:, i],
                obs.features[None, :, i],
                obs.clear[None, :, i],
            )
            for i in range(2)
        ]
        if hidden is not None:
            hidden = jnp.stack([h for h, _ in outputs], axis=1)
        q = np.stack([q[0] for _, q in outputs], axis=1)
        best = np.where(obs.available, q, -np.inf).max(-1)
        if number == 2:
            break
        action = vdn.available_epsilon_greedy(keys[0], q, obs.available, epsilon)
        is_reset = env_state.ended
        step_keys = jax.random.split(keys[1], config.num_envs)
        obs, env_state, reward, shaped, terminated, truncated, _ = step(
            step_keys, env_state, action
        )
        reward = config.reward_scale * (reward + shaping * shaped)
        chosen = np.take_along_axis(q, np.asarray(action)[..., None], axis=-1)[..., 0]
        dies = np.zeros(chosen.shape, bool)
        if config.mixer == "none" and config.env_id.startswith("smax"):
            dies = ~env_state.env_state.state.unit_alive[:, :2]
        rows.append((chosen, best, reward, terminated, truncated, is_reset, dies))
    rows = rows[config.num_steps - config.memory_window :]
    chosen, values, reward, *ends, is_reset, dies = map(np.stack, zip(*rows, strict=True))
    terminated, truncated = ends
    values = np.concatenate([values[1:], best[None]])
    if config.mixer == "vdn":
        chosen, values = chosen.sum(-1, keepdims=True), values.sum(-1, keepdims=True)
    # Without a mixer, the return of an agent ends where it dies.
    over = terminated[..., None] | truncated[..., None] | dies[..., : chosen.shape[-1]]
    if not config.bootstrap_on_truncation:
        terminated = terminated | truncated
    squares = []
    for env in range(config.num_envs):
        for column in range(chosen.shape[-1]):
            for t in np.flatnonzero(~is_reset[:, env]):
                mixed, weight, total, discount = 0.0, 1.0, 0.0, 1.0
                for k in range(t, len(rows)):
                    total += discount * reward[k, env]
                    discount *= config.gamma
                    is_last = terminated[k, env] or dies[k, env, column]
                    value = 0 if is_last else values[k, env, column]
                    ends = over[k, env, column] or k == len(rows) - 1
                    share = 1 if ends else 1 - config.td_lambda
                    mixed += weight * share * (total + discount * value)
                    weight *= config.td_lambda
                    if ends:
                        break
                squares.append((chosen[t, env, column] - mixed) ** 2)
    mean = chosen[~is_reset].mean()
    return np.mean(squares), mean, (terminated & ~is_reset).any(), is_reset.any()


@pytest.mark.parametrize(
    "env_id, network, changes",
    [
        ("smax_short", "gru", {}),
        ("smax_short", "gru", {"mixer": "none", "bootstrap_on_truncation": False}),
        ("smax_short", "gru", {"memory_window": 0}),
        ("overcooked_shaped", "mlp", {}),
    ],
)
def test_loss_of_an_update(env_id, network, changes):
    """Without learning, the second update's loss is that of lambda-returns in slow NumPy."""
    sizes = ROLLOUTS | {"num_layers": 1, "num_epochs": 1, "num_minibatches": 1, "eval_interval": 0}
    config = vdn.Config(
        env_id=env_id, network=network, **sizes | changes | {"learning_rate": 0.0},
        norm="layer_norm", norm_input="none",
        epsilon_decay=0.5, epsilon_finish=0.1, reward_scale=0.5,
    )  # fmt: skip
    train = vdn.make_train(config)
    one_update = jax.jit(lambda state: train(state=state, num_updates=1))
    state = jax.jit(train.init)(jax.random.key(0))
    # Values as large as rewards, so that all of the target counts.
    state = state._replace(variables=jax.tree.map(lambda x: 4 * x, state.variables))
    loss, value, *happened = slow_loss(config, state)
    _, metrics = one_update(one_update(state)[0])
    assert all(happened) or (env_id == "overcooked_shaped" and happened[1])
    np.testing.assert_allclose(metrics["losses/td_loss"][0], loss, rtol=1e-4)
    np.testing.assert_allclose(metrics["losses/q_values"][0], value, rtol=1e-4)


@pytest.fixture(scope="module", params=["smax_3m", "overcooked_cramped_room"])
def played(request):
    """A random rollout of JaxMARL's environment: what ours gives, and what its own step gives."""
    reset, step, env = vdn.make_env(request.param)
    stack = lambda by_agent: jnp.stack([by_agent[agent] for agent in env.agents])  # noqa: E731

    def both(carry, key):
        obs, state = carry
        action_key, key = jax.random.split(key)
        available = obs.available.astype(jnp.float32)
        action = jax.random.categorical(action_key, jnp.log(available))
        actions = dict(zip(env.agents, action, strict=True))
        theirs = env.step(key, state.env_state, actions)
        final = env.get_obs(env.step_env(jax.random.split(key)[0], state.env_state, actions)[1])
        obs, next_state, reward, shaped, *ends, info = step(key, state, action)
        unit_alive = getattr(next_state.env_state, "state", None)
        alive = unit_alive.unit_alive if unit_alive is not None else jnp.ones(2, bool)
        ours = obs.features, obs.clear, obs.available, reward, shaped, *ends, alive
        return (obs, next_state), (
            ours,
            state.ended,
            info,
            stack(theirs[0]),
            theirs[2:],
            stack(final),
        )

    def rollout(key):
        keys = jax.random.split(key, 900)
        return jax.lax.scan(both, reset(keys[0]), keys[1:])[1]

    return env, jax.tree.map(np.asarray, jax.jit(rollout)(jax.random.key(0)))


def test_environment_is_jaxmarls(played):
    """The same where no episode ends; at its end the final observation, and then a reset."""
    env, (ours, was_reset, info, their_obs, (rewards, dones, their_info), final) = played
    features, clear, available, reward, shaped, terminated, truncated, alive = ours
    plain = features if features.ndim > 3 else features[..., : -env.num_agents]
    done, dones = dones["__all__"], [dones[agent] for agent in env.agents]
    steps = ~was_reset
    running = steps & ~done
    np.testing.assert_array_equal(plain[running], their_obs[running])
    np.testing.assert_array_equal(plain[steps], final[steps])
    np.testing.assert_array_equal((terminated | truncated)[steps], done[steps])
    np.testing.assert_array_equal(was_reset[1:], (terminated | truncated)[:-1])
    np.testing.assert_array_equal(reward, np.where(steps, rewards[env.agents[0]], 0))
    assert was_reset.sum() >= 2 and clear[was_reset].all()
    lengths = np.diff(np.flatnonzero(was_reset)) - 1
    np.testing.assert_array_equal(info["returned_episode_lengths"][done & steps][1:], lengths)
    if "win_rate" in info:
        dead = ~alive[:, : env.num_agents]
        np.testing.assert_array_equal(dead[steps], np.stack(dones, axis=-1)[steps])
        np.testing.assert_array_equal(clear[steps], dead[steps])
        assert dead.any() and not features[dead].any() and (features[~dead] != 0).any(-1).all()
        assert (available[dead] == (np.arange(available.shape[-1]) == 4)).all()  # to stop
        ids = features[..., -env.num_agents :]
        np.testing.assert_array_equal(ids, np.eye(env.num_agents) * ~dead[..., None])
        fought = (dead.all(-1) | ~alive[:, env.num_agents :].any(-1)) & steps
        np.testing.assert_array_equal(terminated, fought)
        assert not shaped.any()
    else:
        assert not terminated.any() and not clear[steps].any() and available.all()
        np.testing.assert_array_equal(lengths, 400)
        sums = sum(their_info["shaped_reward"].values())
        np.testing.assert_array_equal(shaped, np.where(steps, sums, 0))
        assert shaped.any()


@pytest.mark.parametrize(
    "enemies, ends", [((True, True, True), (False, True)), ((False, False, False), (True, False))]
)
def test_time_limit_of_smax(enemies, ends):
    """The step after 100 truncates, unless a side is beaten; a victory is rewarded and counted."""
    reset, step, _ = vdn.make_env("smax_3m")
    _, state = jax.jit(reset)(jax.random.key(0))
    health = state.env_state.state.unit_health * jnp.array([True] * 3 + list(enemies))
    units = state.env_state.state.replace(step=jnp.array(100), unit_health=health)
    units = units.replace(unit_alive=health > 0)
    state = state._replace(env_state=state.env_state.replace(state=units))
    _, state, reward, _, terminated, truncated, info = jax.jit(step)(
        jax.random.key(1), state, jnp.full(3, 4)
    )
    assert (bool(terminated), bool(truncated)) == ends and state.ended
    assert bool(info["win_rate"]) == ends[0] and (reward >= 1) == ends[0]


def test_evaluation_is_greedy():
    """It does not depend on the rate of exploration, on which training's returns do."""
    sizes = ROLLOUTS | {"num_layers": 1, "eval_interval": 1, "env_id": "smax_short"}
    sizes |= {"learning_rate": 0.0, "num_envs": 16}
    base = vdn.Config(**sizes, network="mlp")

    def returns(epsilon):
        config = dataclasses.replace(base, epsilon_start=epsilon, epsilon_finish=epsilon)
        _, metrics = vdn.make_train(config)(jax.random.key(0), num_updates=2)
        return metrics["eval/episodic_return"], metrics["charts/episodic_return"]

    evaluated, training = jax.jit(jax.vmap(returns))(jnp.array([0.0, 1.0]))
    np.testing.assert_allclose(*evaluated, rtol=1e-5)
    assert (np.abs(training[0] - training[1]) > 0.01).all()


def test_evaluation_counts_whole_episodes():
    sizes = ROLLOUTS | {"num_layers": 1, "eval_interval": 1, "env_id": "overcooked_shaped"}
    config = vdn.Config(**sizes | {"learning_rate": 0.0}, network="mlp")
    _, metrics = jax.jit(lambda key: vdn.make_train(config)(key, num_updates=2))(jax.random.key(0))
    np.testing.assert_array_equal(metrics["eval/episodic_return"], 10)  # unshaped: 5 steps of 2
    np.testing.assert_array_equal(metrics["eval/soups"], 0.5)
    np.testing.assert_array_equal(metrics["charts/episodic_return"], 10)


def test_defaults_of_the_environment():
    """They are filled in, in code and in the help; what is given stays."""
    for name, defaults in vdn.DEFAULTS.items():
        config = vdn.Config(env_id=f"{name}_x", td_lambda=0.3)
        assert config.td_lambda == 0.3
        assert all(getattr(config, x) == y for x, y in defaults.items() if x != "td_lambda")
        assert vdn.parse_args([f"--env-id={config.env_id}", "--td-lambda=0.3"]) == config
    optional = [x.name for x in dataclasses.fields(vdn.Config) if x.default is None]
    assert set(optional) - {"resume", "wandb_entity"} == set(vdn.DEFAULTS["smax"])
    assert set(vdn.DEFAULTS["smax"]) == set(vdn.DEFAULTS["overcooked"])


@pytest.mark.parametrize("env_id", ["smax_4m", "overcooked_kitchen", "hanabi"])
def test_unknown_environments_are_refused(env_id):
    with pytest.raises(ValueError, match=f"--env-id is {env_id}"):
        vdn.make_train(vdn.Config(env_id=env_id))


def test_network_for_images_only():
    with pytest.raises(ValueError, match="--network is cnn"):
        vdn.Config(env_id="smax_3m", network="cnn")
