"""The Triton margin loss against the float64 definition, on the GPU or through Triton's interpreter.

Every term of the formulas is guarded: taken out of a kernel, it makes the test named beside it fail.

    target kept out of the log-sum-exp, log1p     test_confident_logits_keep_their_gradient
    rescaling of the running sum (best changes)   test_equals_the_definition, test_strips_and_chunks_change_nothing
    1/|x|, 1/|w| in forward and in P              test_equals_the_definition
    projection of dx and dw                       test_gradients_are_orthogonal_to_their_vectors
    φ, φ' inside, beyond π, below 0               test_every_branch_of_the_margin
    straight-through slope                        test_every_branch_of_the_margin
    additive margin, scale, weight, denominators  test_equals_the_definition
    ε (mean logit) in ℓ and in both slopes        test_label_smoothing
    upstream gradient                             test_equals_the_definition (a factor of 3)
    class ranges, other domains' classes          test_overlapping_ranges_add_up, test_rows_in_no_range_get_zero
    label -1, empty domain, nothing valid         test_ignored_samples, test_nothing_valid
    label out of range                            test_a_label_out_of_range_cannot_pass
    strips, windows, chunks, splits               test_strips_windows_and_chunks_change_nothing
    global statistics of sharded class rows       test_shards_add_up_to_the_whole
"""

import contextlib
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

triton = pytest.importorskip("triton")
from triton.runtime.interpreter import GridExecutor  # noqa: E402

from kernels import margin_plan, margin_triton  # noqa: E402
from kernels.margin_loss import Shard, margin_loss, margin_loss_reference  # noqa: E402
from tests import interpreter  # noqa: E402

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPES = [(torch.float32, torch.float32), (torch.float16, torch.float32), (torch.bfloat16, torch.float32),
          (torch.bfloat16, torch.bfloat16)]
NAMES = ("loss", "per_domain", "target_cos", "dx", "dw")
interpreter.repair()


@pytest.fixture(autouse=True)
def exact_products():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def problem(n, classes, dim, seed=0, ranges=None, dtypes=(torch.float32, torch.float32)):
    """Vectors of any length; domain 0 of `classes`, 1 of one class, 2 of 3 x classes, 3 without samples."""
    g = torch.Generator().manual_seed(seed)
    ranges = ranges or [(0, classes), (classes, classes + 1), (classes + 1, 4 * classes + 1),
                        (4 * classes + 1, 4 * classes + 4)]
    known = max(len(ranges) - 1, 1)
    domains = torch.randint(0, known, (n,), generator=g)
    sizes = torch.tensor([end - start for start, end in ranges])
    labels = (torch.rand(n, generator=g) * sizes[domains]).long()
    x = torch.randn(n, dim, generator=g) * torch.rand(n, 1, generator=g).add(0.1)
    w = torch.randn(max(end for _, end in ranges), dim, generator=g)
    return [v.to(DEVICE) for v in (x.to(dtypes[0]), w.to(dtypes[1]), labels, domains)] + [ranges]


def results(x, w, labels, domains, ranges, impl, dtype=None, upstream=3.0, **options) -> list[torch.Tensor]:
    """loss, per_domain, target_cos, dx, dw in float64, and top-1."""
    x, w = (v.detach().to(dtype or v.dtype).requires_grad_() for v in (x, w))
    out = margin_loss(x, w, labels, domains, ranges, impl=impl, **options)
    (upstream * out.loss).backward()
    return [v.detach().double() for v in (out.loss, out.per_domain, out.target_cos, x.grad, w.grad)] + [out.correct]


def autocast(x, w, labels, domains, ranges, scale, margin_angular=0.0, margin_additive=0.0, upstream=3.0):
    """What eager code in the embeddings' precision would give (products rounded), as the allowance of the kernel."""
    x, w = (v.detach().clone().requires_grad_() for v in (x, w))
    total, seen = 0, [k for k in range(len(ranges)) if ((domains == k) & (labels >= 0)).any()]
    for k in seen:
        rows = ((domains == k) & (labels >= 0)).nonzero().flatten()
        own = torch.arange(len(rows), device=x.device), labels[rows]
        unit = torch.nn.functional.normalize
        low = x.dtype
        cos = (unit(x[rows].float()).to(low) @ unit(w[slice(*ranges[k])].float()).to(low).T).float()
        t = cos[own].clamp(-1 + 1e-6, 1 - 1e-6)
        phi = (t.arccos() + margin_angular).cos() - margin_additive
        total = total + torch.nn.functional.cross_entropy(scale * cos.index_put(own, phi), labels[rows]) / len(seen)
    (upstream * total).backward()
    return x.grad.double(), w.grad.double()


def agree(found, truth, tolerance=2e-5, names=NAMES):
    for name, one, other in zip(names, found, truth, strict=False):
        worst = (one - other).abs().nan_to_num(0).max() if one.numel() else 0
        bound = tolerance * other.abs().nan_to_num(0).max().clamp(min=1e-3) if other.numel() else 0
        assert torch.equal(one.isnan(), other.isnan()), name
        assert worst <= bound, f"{name}: worst element is off by {float(worst):.3g}, allowed {float(bound):.3g}"


SINGLE = [(1, 2, 3), (2, 5, 2), (17, 7, 64), (101, 131, 33), (257, 67, 17)]


@pytest.mark.parametrize("n, classes, dim, dtypes", [(*shape, DTYPES[0]) for shape in SINGLE]
                         + [(n, 37, 33, dtypes) for n, dtypes in zip((70, 133, 65), DTYPES[1:], strict=True)], ids=str)
def test_equals_the_definition(n, classes, dim, dtypes):
    case = problem(n, classes, dim, dtypes=dtypes)
    g = torch.Generator().manual_seed(1)
    rows = {"sample_scale": torch.rand(n, generator=g) * 40 + 1,
            "sample_margin_angular": torch.rand(n, generator=g) * 2 - 1,
            "sample_margin_additive": torch.rand(n, generator=g) * 0.4}
    options = {name: v.to(DEVICE) for name, v in rows.items()}
    options["domain_weight"] = torch.tensor([1.0, 2.0, 0.5, 3.0], device=DEVICE)
    counts = {"domain_count": torch.tensor([90, 80, 70, 60])}
    for more in ({}, counts | {"num_domains": 7}, counts | {"reduction": "sample"})[: 3 if n < 100 else 2]:
        truth = results(*case, "torch", torch.float64, **options, **more)
        found = results(*case, "triton", **options, **more)
        half = dtypes != (torch.float32, torch.float32)
        # dx comes back in fp16 or bf16; the products of bf16 inputs are compared with eager ones below
        agree(found, truth, 0.03 if torch.bfloat16 in dtypes else 1e-3 if half else 2e-5)
        assert found[-1].tolist() == truth[-1].tolist() or torch.bfloat16 in dtypes


@pytest.mark.parametrize("n, dtypes", [(130, DTYPES[1]), (130, DTYPES[2]), (40, DTYPES[3]), (260, DTYPES[2])], ids=str)
def test_errors_stay_below_those_of_eager_code(n, dtypes):
    """bf16 with fp32 weights is what training runs: its products see bf16 copies of both."""
    case = problem(n, 80, 64, dtypes=dtypes)
    options = {"scale": 32.0, "margin_angular": 0.2, "margin_additive": 0.1}
    truth = results(*case, "torch", torch.float64, **options)[3:5]
    found = results(*case, "triton", **options)[3:5]
    for name, one, eager, exact in zip(("dx", "dw"), found, autocast(*case, **options), truth, strict=True):
        worst, allowed = ((v - exact).abs().max() for v in (one, eager))
        print(f"{name}: worst element off by {float(worst):.3g}, eager {float(allowed):.3g}")
        assert 0 < worst <= allowed + torch.finfo(dtypes[0]).eps * exact.abs().max() / 4


def test_confident_logits_keep_their_gradient():
    s, C = 64.0, 50
    for p in (0.9, 0.99, 0.999, 1 - 1e-7, 1 - 1e-9):
        other = (s * 0.5 + math.log((1 - p) / p / (C - 1))) / s
        w = torch.eye(C, C + 1, dtype=torch.float64).roll(1, 1)
        w[:, 0] = other
        w[0, 0] = 0.5
        w[:, 1:] *= torch.sqrt(1 - w[:, :1].square())
        x = torch.zeros(1, C + 1, dtype=torch.float64)
        x[0, 0] = 1
        zero = torch.zeros(1, dtype=torch.long, device=DEVICE)
        case = (x.float().to(DEVICE), w.float().to(DEVICE), zero, zero, [(0, C)])
        truth = results(*case, "torch", torch.float64, scale=s)
        assert float(truth[0]) == pytest.approx(-math.log(p), rel=2e-5)
        for one, exact in zip(results(*case, "triton", scale=s)[:5], truth, strict=False):
            torch.testing.assert_close(one, exact, rtol=1e-4, atol=1e-7 * float(exact.abs().max()))


@pytest.mark.parametrize("gradient", ["exact", "straight_through"])
def test_every_branch_of_the_margin(gradient):
    """Two classes in the plane, the sample turned to any angle: θ + m inside, beyond π, below 0, at its edges."""
    angles = torch.tensor([0.0, 5e-4, 0.1, 0.5, 1.5, 2.5, 2.9, 3.1, math.pi - 5e-4, math.pi])
    margins = torch.tensor([-1.2, -0.2, 0.0, 0.3, 1.0])
    theta, m = (v.flatten() for v in torch.meshgrid(angles, margins, indexing="ij"))
    x = torch.stack([theta.cos(), theta.sin(), torch.full_like(theta, 0.1)], 1).to(DEVICE)
    w = torch.tensor([[1.0, 0, 0.1], [0, 1, 0.3]], device=DEVICE)
    zero = torch.zeros(len(x), dtype=torch.long, device=DEVICE)
    case = (x, w, zero, zero, [(0, 2)])
    options = {"scale": 4.0, "sample_margin_angular": m.to(DEVICE), "gradient": gradient}
    found, eager, truth = (results(*case, impl, dtype, **options) for impl, dtype in (
        ("triton", None), ("torch", None), ("torch", torch.float64)))
    for name, one, other, exact in zip(NAMES, found, eager, truth, strict=False):
        # near θ = 0 the slope is 1000 and the third digit of fp32 is gone for everyone: compare with eager fp32
        assert ((one - exact).abs() <= 2 * (other - exact).abs() + 1e-5 * exact.abs().max()).all(), name


@pytest.mark.parametrize("eps", [0.1, [0.3, 0.0, 0.05, 0.0]])
def test_label_smoothing(eps):
    eps = eps if isinstance(eps, float) else torch.tensor(eps, device=DEVICE)
    case = problem(40, 90, 24)
    options = {"scale": 16.0, "margin_additive": 0.2, "label_smoothing": eps}
    agree(results(*case, "triton", **options), results(*case, "torch", torch.float64, **options))


def test_gradients_are_orthogonal_to_their_vectors():
    x, w, *rest = problem(60, 30, 48)
    *_, dx, dw, _ = results(x, w, *rest, "triton", scale=20.0, margin_additive=0.3)
    for vector, grad in ((x, dx), (w, dw)):
        along = (vector.double() * grad).sum(1).abs()
        assert (along <= 1e-5 * vector.double().norm(dim=1) * grad.norm(dim=1) + 1e-9).all()
    low = w.bfloat16().float()  # the component that is taken off is that of the rounded P of the products
    *_, dw, _ = results(x.bfloat16(), low, *rest, "triton", scale=20.0, margin_additive=0.3)
    along = (low.double() * dw).sum(1).abs()
    assert (along <= 2e-5 * low.double().norm(dim=1) * dw.norm(dim=1) + 1e-9).all()


@pytest.mark.parametrize("ranges", [
    [(0, 150), (100, 210)], [(0, 200), (0, 200), (0, 200)], [(3, 5), (64, 64), (60, 141), (0, 141)],
])  # fmt: skip
def test_overlapping_ranges_add_up(ranges):
    case = problem(50, 0, 20, ranges=[*ranges, ranges[-1]])  # the last one has no samples
    case[2] = torch.where(case[3] == 1, -1, case[2]) if ranges[1][0] == ranges[1][1] else case[2]
    agree(results(*case, "triton", scale=20.0), results(*case, "torch", torch.float64, scale=20.0))


@pytest.fixture
def settings(monkeypatch):
    """Sets constants of the plan; plans made before do not count, nor do these afterwards."""
    def set_to(**values):
        margin_plan.make_plan.cache_clear()
        for name, value in values.items():
            monkeypatch.setattr(margin_plan, name, value)

    yield set_to
    margin_plan.make_plan.cache_clear()


@pytest.mark.parametrize("chunk", [64, 100_000])
def test_rows_in_no_range_get_zero(settings, chunk):
    """Within a chunk that some range reaches, and past all of them."""
    settings(CHUNK=chunk, CHUNK_BYTES=0)
    x, w, labels, domains, _ = problem(20, 200, 16)
    ranges = [(10, 60), (150, 160), (300, 330)]
    labels = labels % 10
    *_, dw, _ = results(x, w, labels, domains, ranges, "triton", scale=10.0)
    used = torch.zeros(len(w), dtype=torch.bool, device=DEVICE)
    for start, end in ranges:
        used[start:end] = True
    assert (dw[~used] == 0).all() and (dw[used].abs().sum(1) > 0).all()


@pytest.mark.parametrize("n, dim, values", [
    (45, 40, {"STRIP": 64, "CHUNK": 64}), (45, 40, {"STRIP": 128, "CHUNK": 128, "choose_splits": lambda *_: 3}),
    (45, 40, {"COPY_BYTES": 0, "WINDOW_BYTES": 4 * 64 * 4 * 128, "STRIP": 64, "CHUNK": 64}), (150, 16, {"CHUNK": 128}),
], ids=["strips", "splits", "windows", "rows"])  # fmt: skip
def test_strips_windows_and_chunks_change_nothing(settings, n, dim, values):
    """Several strips of classes a sample, several windows of the copied W, several chunks, several splits."""
    case = problem(n, 110, dim)
    options = {"scale": 30.0, "margin_angular": 0.2, "label_smoothing": 0.1}
    settings(CHUNK_BYTES=0, **values)
    agree(results(*case, "triton", **options), results(*case, "torch", torch.float64, **options))


def test_ignored_samples():
    x, w, labels, domains, ranges = problem(40, 20, 16)
    keep = torch.arange(40, device=DEVICE) % 3 > 0
    first = int((keep & (domains == 0)).nonzero()[0])
    x[first] = w[labels[first]]  # the sample of slot 0 is correct; ignored ones, which have no slot, stay False
    some = results(x[keep], w, labels[keep], domains[keep], ranges, "triton", scale=10.0)
    masked = results(x, w, torch.where(keep, labels, -1), domains, ranges, "triton", scale=10.0)
    assert masked[2].isnan().tolist() == (~keep).tolist() and not masked[5][~keep].any()
    assert (masked[3][~keep] == 0).all()
    agree([*masked[:2], masked[3][keep], masked[4]], [*some[:2], *some[3:5]], names=("loss", "per_domain", "dx", "dw"))


def test_nothing_valid():
    x, w, labels, domains, ranges = problem(10, 5, 8)
    loss, per_domain, cos, dx, dw, correct = results(x, w, torch.full_like(labels, -1), domains, ranges, "triton",
                                                     scale=10.0)
    assert loss == 0 and per_domain.isnan().all() and cos.isnan().all() and not correct.any()
    assert (dx == 0).all() and (dw == 0).all()


def test_no_samples_and_no_classes():
    x, w, labels, domains, ranges = problem(3, 5, 8)
    out = margin_loss(x[:0], w, labels[:0], domains[:0], ranges, scale=10.0, impl="triton")
    assert out.loss == 0 and out.target_cos.shape == (0,)
    out = margin_loss(x, w[:0], torch.full_like(labels, -1), domains, [(0, 0)] * 4, scale=10.0, impl="triton")
    assert out.loss == 0 and out.per_domain.isnan().all()


def test_zero_vectors_and_perfect_targets_have_finite_gradients():
    w = torch.eye(4)[:3].clone()
    w[2] = 0
    x = torch.stack([torch.zeros(4), torch.eye(4)[0] * 5, -torch.eye(4)[1]])
    x = torch.cat([x, torch.eye(4)[2:3]])
    labels, domains = torch.tensor([0, 0, 1, 2]), torch.zeros(4, dtype=torch.long)  # the last one's class is zero
    case = [v.to(DEVICE) for v in (x, w, labels, domains)] + [[(0, 3)]]
    found = results(*case, "triton", scale=64.0, margin_angular=0.5)
    agree(found, results(*case, "torch", torch.float64, scale=64.0, margin_angular=0.5))
    assert (found[3][0] == 0).all() and (found[4][2] == 0).all()
    assert found[2].tolist() == pytest.approx([0, 1, -1, 0]) and found[5].tolist() == [False, True, False, False]


def test_one_dimension():
    """All cosines are 1 or -1 and no direction is left to move in: the projections cancel everything."""
    loss, _, cos, dx, dw, _ = results(*problem(9, 6, 1), "triton", scale=8.0)
    assert torch.isfinite(loss) and torch.allclose(cos.abs(), torch.ones_like(cos))
    assert dx.abs().max() < 1e-3 and dw.abs().max() < 1e-3


def test_same_bits_every_time():
    case = problem(70, 60, 32)
    first, second = (results(*case, "triton", scale=30.0, margin_additive=0.3) for _ in range(2))
    assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(first, second, strict=True))


def test_only_what_is_asked_for_gets_a_gradient():
    x, w, labels, domains, ranges = problem(20, 10, 8)
    both = results(x, w, labels, domains, ranges, "triton", upstream=1.0, scale=10.0)
    for name, place in (("x", 3), ("w", 4)):
        a, b = x.clone().requires_grad_(name == "x"), w.clone().requires_grad_(name == "w")
        margin_loss(a, b, labels, domains, ranges, scale=10.0, impl="triton").loss.backward()
        assert (a.grad is None) == (name == "w") and (b.grad is None) == (name == "x")
        assert torch.equal((a if name == "x" else b).grad.double(), both[place])


@pytest.mark.parametrize("labels", [[0, 9], [0, -2]])
def test_a_label_out_of_range_cannot_pass(labels):
    """On a GPU nobody looks at the labels beforehand: the loss is NaN, nothing outside W is read."""
    x, w = torch.randn(2, 4, device=DEVICE), torch.randn(5, 4, device=DEVICE)
    labels, domains = torch.tensor(labels, device=DEVICE), torch.tensor([0, 1], device=DEVICE)
    if not GPU:
        with pytest.raises(ValueError, match="sample 1"):
            margin_loss(x, w, labels, domains, [(0, 3), (3, 5)], scale=10.0, impl="triton")
    a, b = x.clone().requires_grad_(), w.clone().requires_grad_()
    margin_loss_reference(a, b, labels, domains, [(0, 3), (3, 5)], scale=10.0).loss.backward()
    assert a.grad[0].isnan().all() and b.grad[:3].isnan().all()  # the definition: no gradient that passes for one
    one = torch.ones(2, device=DEVICE)
    x.requires_grad_(), w.requires_grad_()
    loss, *_ = margin_triton.margin_loss(x, w, labels, domains, [(0, 3), (3, 5)], None, [one] * 3, (False,) * 3, one,
                                         0 * one, None, num_domains=0, BY_SAMPLE=False, STRAIGHT=False, SMOOTH=False)
    loss.backward()
    assert loss.isnan() and x.grad[0].isnan().all() and w.grad[:3].isnan().all()


# ---------------------------------------------------------------- what the host does


@pytest.fixture
def launches(monkeypatch):
    """Launches as (kernel, grid, whether on the call's own device), in order; none of them runs."""
    noted, current = [], []

    @contextlib.contextmanager
    def device_of(tensor):
        current.append(tensor.device)
        yield
        current.pop()

    def note(self, *arguments, **options):
        noted.append((self.fn.__name__, self.grid, bool(current)))

    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **kind: empty(*size, **kind).zero_())
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(GridExecutor, "__call__", note)
    return noted


def four_domains(n=1024, classes=25_000, dim=128):
    """Embeddings in bf16, weights in fp32, as in a training step of schedule B."""
    x, w = torch.zeros(n, dim, dtype=torch.bfloat16).requires_grad_(), torch.zeros(4 * classes, dim).requires_grad_()
    return x, w, torch.arange(n), torch.arange(n) % 4, [(k * classes, (k + 1) * classes) for k in range(4)]


@pytest.mark.skipif(GPU, reason="looks into the interpreter")
def test_domains_share_their_launches(launches):
    """Chunks run over class numbers, all domains at once: 5 of 5,120 for 25,000 each, 3 launches a chunk."""
    margin_loss(*four_domains(), scale=64.0, impl="triton").loss.backward()
    assert [name for name, *_ in launches] == ["group_rows", "sample_norms", "class_norms", "cosine_tiles", "losses",
                                               *["gradient_tiles", "sample_products", "class_products"] * 5]
    assert all(guarded for *_, guarded in launches)  # each under a guard for the device of its tensors
    grids = {name: grid for name, grid, _ in launches[:8]}
    # tiles of 128: 8 that 4 x 256 samples fill, and 3 that only other shares of the domains would; 40 x 128 classes
    assert grids["gradient_tiles"] == (11, 40) and grids["class_products"] == (40, 1, 4)
    assert grids["sample_products"] == (11, 1, 9)  # a part of a wave: 1 / s + 0.0136 s is least at 8.6
    assert 8 * 40 / (11 * 40) > 0.7  # of the programs find work


@pytest.mark.skipif(GPU, reason="looks into the interpreter")
def test_the_host_waits_for_nothing(launches):
    """No value is read back and no size depends on one: a call can be captured in a CUDA graph."""
    class Listen(TorchDispatchMode):
        heard = ()

        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            self.heard += (str(function),)
            return function(*arguments, **(options or {}))

    call = four_domains(64, 100)
    margin_triton.class_tables.cache_clear()
    margin_loss(*call, scale=64.0, impl="triton")  # fills the cache of tables; the checks on the CPU read values
    x, w, labels, domains, ranges = call
    one = torch.ones(4)
    with Listen() as host:
        loss, *_ = margin_triton.margin_loss(x, w, labels, domains, ranges, None, [one] * 3, (False,) * 3, one, one,
                                             None, num_domains=4, BY_SAMPLE=False, STRAIGHT=False, SMOOTH=True)
        loss.backward()
    assert len(host.heard) > 20
    waits = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "_to_cpu", "bincount")
    assert not [name for name in host.heard if any(word in name for word in waits)]


def test_a_first_call_under_inference_mode_spoils_nothing():
    case = problem(5, 4, 8)
    margin_triton.class_tables.cache_clear()
    with torch.inference_mode():
        margin_loss(*case, scale=9.0, impl="triton")
    agree(results(*case, "triton", scale=9.0), results(*case, "torch", torch.float64, scale=9.0))


def test_the_plan_of_the_sizes_that_are_meant():
    """Worked by hand: MiB beyond inputs and gradients, splits, windows."""
    def plan(N, D, *sizes, weight=torch.float32):
        ends = [sum(sizes[: k + 1]) for k in range(len(sizes))]
        ranges = tuple((end - size, end) for end, size in zip(ends, sizes, strict=True))
        return margin_plan.make_plan(N, D, ranges, torch.bfloat16, weight, "high", 132)

    one, four = plan(1024, 768, 100_000), plan(1024, 768, *[25_000] * 4)
    assert (one.launch.rows, four.launch.rows) == (256, 128) and one.windows() == [(0, 100_000)]
    # W 146.5, P 16, sums 2 x 3, samples 1.5, 1/|w| 0.4, along 0.3
    assert 168 < one.workspace(100_000) / 2**20 < 173 and one.splits == 2 and len(one.chunks(0, 100_000)) == 13
    assert four.workspace(100_000) / 2**20 < 180
    assert margin_plan.choose_splits(288, 8192, 132) == 2  # waves 3 / 1, 5 / 2, 7 / 3; a split's traffic is 0.22 of one
    large = plan(4096, 1024, 2_200_000)
    assert large.splits == 1 and large.workspace(2_200_000) / 2**20 < 350  # of 1,000; all of W would be 4,297
    assert large.window * 1024 * 2 <= 2**28 and large.copy and len(large.windows()) == 17
    assert not plan(1024, 768, 1000, weight=torch.bfloat16).copy and plan(1024, 700, 1000, weight=torch.bfloat16).copy
    assert plan(256, 768, *[2500] * 4).launch.rows == 64  # a default run
    # disjoint or equal ranges need one pass, others one after the other
    assert margin_plan.disjoint_groups(((0, 5), (5, 9), (0, 5))) == [[(0, 5), (5, 9)]]
    assert margin_plan.disjoint_groups(((0, 5), (3, 9), (5, 9), (4, 4))) == [[(0, 5), (5, 9)], [(3, 9)]]


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU with 20 GB")
def test_offsets_past_2_31():
    C, D = 2_200_000, 1024
    x, w = torch.randn(300, D, device=DEVICE), torch.randn(C, D, device=DEVICE)
    labels, domains = torch.arange(300, device=DEVICE) * 3, torch.zeros(300, dtype=torch.long, device=DEVICE)
    *_, dx, dw, _ = results(x, w, labels, domains, [(C - 1000, C)], "triton", scale=20.0, margin_additive=0.2)
    truth = results(x, w[-1000:], labels, domains, [(0, 1000)], "torch", torch.float64, scale=20.0, margin_additive=0.2)
    agree([dx, dw[-1000:]], truth[3:5], names=("dx", "dw"))
    assert not dw[:-1000].any()


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_a_captured_step_gives_the_same_bits():
    case = problem(130, 80, 64, dtypes=(torch.bfloat16, torch.float32))
    x, w = (v.requires_grad_() for v in case[:2])

    def step():
        x.grad = w.grad = None
        margin_loss(x, w, *case[2:], scale=30.0, margin_angular=0.2, impl="triton").loss.backward()

    step()
    expected = x.grad.clone(), w.grad.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    graph.replay()
    assert torch.equal(x.grad, expected[0]) and torch.equal(w.grad, expected[1])


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="the interpreter computes TF32 products in fp32")
def test_tf32_where_torch_allows_it():
    case = problem(130, 80, 64)
    options = {"scale": 32.0, "margin_angular": 0.2, "margin_additive": 0.1}
    truth = results(*case, "torch", torch.float64, **options)
    exact = results(*case, "triton", **options)
    torch.set_float32_matmul_precision("high")
    found = results(*case, "triton", **options)
    agree(found, truth, 5e-3)
    assert (found[4] - truth[4]).abs().max() > 3 * (exact[4] - truth[4]).abs().max()


# ---------------------------------------------------------------- class rows sharded over ranks


def shards_of(ranges, parts):
    """Rows of the whole W, local ranges and Shard of every rank: a near-equal slice of every domain."""
    found = []
    for rank in range(parts):
        rows, local, start, total = [], [], [], []
        for first, last in ranges:
            size = last - first
            low, high = size * rank // parts, size * (rank + 1) // parts
            local.append((len(rows), len(rows) + high - low))
            rows += range(first + low, first + high)
            start.append(low)
            total.append(size)
        found.append((rows, local, Shard(tuple(start), tuple(total))))
    return found


@pytest.mark.parametrize("impl, dtype, smoothing", [("torch", torch.float64, 0.1), ("triton", torch.float32, 0.0),
                                                    ("triton", torch.float32, 0.1)])
@pytest.mark.parametrize("parts", [2, 3])
def test_shards_add_up_to_the_whole(parts, impl, dtype, smoothing):
    """Ranks one after the other: each writes down its statistics first, then all are told the merged ones."""
    x, w, labels, domains, ranges = problem(40, 20, 16)
    labels[3] = -1
    options = {"scale": 20.0, "margin_angular": 0.3, "label_smoothing": smoothing}
    whole = results(x, w, labels, domains, ranges, "torch", torch.float64, **options)
    found = shards_of(ranges, parts)
    notes = []

    def listen(*statistics, scale):
        notes.append([v.clone() for v in statistics])
        return statistics

    def tell(*_, scale):
        best, mass, total, target = (torch.stack(v) for v in zip(*notes, strict=True))
        top = best.amax(0)
        here = torch.where(best == -math.inf, 0.0, mass * (scale * (best - top)).exp())
        return top, here.sum(0), total.sum(0), target.amax(0)

    for rows, local, shard in found:
        margin_loss(x.to(dtype), w[rows].to(dtype), labels, domains, local, impl=impl,
                    shard=shard._replace(merge=listen), **options)
    share_x, share_w = torch.zeros_like(x, dtype=torch.float64), torch.zeros_like(w, dtype=torch.float64)
    for rows, local, shard in found:
        out = results(x, w[rows], labels, domains, local, impl, dtype, shard=shard._replace(merge=tell), **options)
        agree(out[:3], whole, names=NAMES[:3])
        assert out[5].tolist() == whole[5].tolist()
        share_x += out[3]
        share_w[rows] += out[4]
    agree([share_x, share_w], whole[3:5], names=("dx", "dw"))


def test_reference_is_the_same_with_one_shard():
    case = problem(30, 9, 8)
    *inputs, ranges = [v.double() if torch.is_tensor(v) and v.is_floating_point() else v for v in case]
    sizes = tuple(end - start for start, end in ranges)
    plain = margin_loss_reference(*inputs, ranges, scale=9.0)
    one = margin_loss_reference(*inputs, ranges, scale=9.0, shard=Shard((0,) * 4, sizes))
    assert plain.loss == one.loss
