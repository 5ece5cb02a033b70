/* The optimizer step on a CPU. One pass over a tensor computes its norms, and one updates it while it is in cache.

   REAL, float or double, is the type of the tensors and of the arithmetic on their elements. Sums of squares are
   computed in double, in an order that depends only on the size. Multiplications and additions are not contracted
   (-ffp-contract=off). Therefore all CPUs and all numbers of threads give the same bits.

   A nonfinite weight must not affect more than it does in the Python loop: without weight decay, the update of the
   momentum buffer does not read the weight.

   `squares`, `lars` and `lamb` take `count` tensors. The k-th weight ws[k], gradient gs[k] and so on have sizes[k]
   elements each, and do not overlap. They return 0 and change nothing if a tensor has no aligned memory, and 1
   otherwise. The structures are declared again in kernels.py. */

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <tgmath.h>

/* Compiled for three vector widths; the loader chooses the widest one that the CPU supports. */
#if defined(__x86_64__) && defined(__linux__) && !defined(ONE_CPU)
#define EVERY_CPU __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define EVERY_CPU
#endif
#define INLINE static inline __attribute__((always_inline))

/* A tensor is split into at most PARTS parts of at least PART elements, which are distributed over the threads. */
enum { LANES = 8, CHUNK = 512, PARTS = 64, PART = 16384 };

typedef REAL reals __attribute__((vector_size(LANES * sizeof(REAL)), aligned(sizeof(REAL)), may_alias));
typedef double doubles __attribute__((vector_size(LANES * sizeof(double))));

/* LANES elements, converted to double */
#define WIDE(x) __builtin_convertvector(*(const reals *)(x), doubles)

INLINE double total(const doubles *even, const doubles *odd)
{
    const doubles lanes = *even + *odd;
    double sum = 0;
    for (size_t j = 0; j < LANES; j++)
        sum += lanes[j];
    return sum;
}

INLINE size_t part_of(size_t n)
{
    const size_t chunks = (n + PARTS * CHUNK - 1) / (PARTS * CHUNK);
    return chunks * CHUNK > PART ? chunks * CHUNK : PART;
}

INLINE size_t parts_of(size_t n)
{
    return (n + part_of(n) - 1) / part_of(n);
}

INLINE size_t length_of(size_t n, size_t j)
{
    const size_t start = j * part_of(n);
    return n - start < part_of(n) ? n - start : part_of(n);
}

/* ---------------------------------------------------------------------------------------------------------- memory */

/* Whether every tensor has aligned memory. A null list has no tensors. */
static int have_memory(size_t count, const size_t *sizes, REAL *const *xs)
{
    for (size_t k = 0; xs && k < count; k++)
        if ((!xs[k] && sizes[k]) || (uintptr_t)xs[k] % sizeof(REAL))
            return 0;
    return 1;
}

struct span {
    uintptr_t start, end;
};

static int by_start(const void *a, const void *b)
{
    const uintptr_t x = ((const struct span *)a)->start, y = ((const struct span *)b)->start;
    return (x > y) - (x < y);
}

/* The number of threads, or 1 if weights share memory, e.g. if one is listed twice */
static int threads_for(size_t count, const size_t *sizes, REAL *const *ws, int threads)
{
    if (threads == 1)
        return 1;
    struct span *spans = malloc((count + 1) * sizeof *spans);
    if (!spans)
        return 1;
    for (size_t k = 0; k < count; k++)
        spans[k] = (struct span){(uintptr_t)ws[k], (uintptr_t)(ws[k] + sizes[k])};
    qsort(spans, count, sizeof *spans, by_start);
    for (size_t k = 1; k < count; k++)
        if (spans[k].start < spans[k - 1].end)
            threads = 1;
    free(spans);
    return threads;
}

/* ---------------------------------------------------------------------------------------------------- trust ratio */

struct trust { /* the options of trust_ratios in steps/trust.py, in their order */
    double coefficient, penalty, eps, max_norm, max_ratio; /* inf: no bound */
    double clip_to_lr;                                     /* 0: not clipped */
    int formula;                                           /* zero_norm="formula" */
};

INLINE double least(double a, double b)
{
    return b < a ? b : a; /* nan if a is nan */
}

/* trust_ratios of steps/trust.py for one tensor */
static double trust_ratio(double w_norm, double u_norm, const struct trust *trust)
{
    if (!isfinite(u_norm))
        return NAN;
    if (!(w_norm > 0 && u_norm > 0) && !trust->formula)
        return 1;
    const double w = least(w_norm, trust->max_norm);
    const double denominator = least(u_norm, trust->max_norm) + trust->penalty * w + trust->eps;
    double ratio = denominator > 0 ? trust->coefficient * w / denominator : 0;
    ratio = least(ratio, trust->max_ratio);
    if (trust->clip_to_lr > 0)
        ratio = least(ratio, trust->clip_to_lr) / trust->clip_to_lr;
    return ratio;
}

/* ---------------------------------------------------------------------------------------------------------- norms */

INLINE double sum_of_squares(const REAL *x, size_t n)
{
    doubles even = {0}, odd = {0};
    size_t i = 0;
    for (; i + 2 * LANES <= n; i += 2 * LANES) {
        const doubles x0 = WIDE(x + i), x1 = WIDE(x + i + LANES);
        even += x0 * x0, odd += x1 * x1;
    }
    double sum = total(&even, &odd);
    for (; i < n; i++)
        sum += (double)x[i] * x[i];
    return sum;
}

EVERY_CPU double part_squares(const REAL *x, size_t n)
{
    return sum_of_squares(x, n);
}

/* sums[k] = the sum of squares of the k-th tensor */
int squares(size_t count, const size_t *sizes, REAL *const *xs, double *sums, int threads)
{
    if (!have_memory(count, sizes, xs))
        return 0;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (size_t k = 0; k < count; k++) {
        sums[k] = 0;
        for (size_t j = 0; j < parts_of(sizes[k]); j++)
            sums[k] += part_squares(xs[k] + j * part_of(sizes[k]), length_of(sizes[k], j));
    }
    return 1;
}

/* ----------------------------------------------------------------------------------------------------------- LARS */

struct lars {
    struct trust trust;
    double lr, momentum, weight_decay, max_element; /* inf: no bound */
    double sign;                                    /* of the gradient; -1: maximize */
    int lr_inside, ratio_inside;                    /* applied before the momentum buffer */
    int adapt, watch, joint, raw, skip, nesterov;
};

/* The factors in the update of one tensor */
struct factors {
    REAL inside, outside, decay;
    int skip;
};

/* The sums of w², g² and w * g */
EVERY_CPU void lars_sums(const REAL *w, const REAL *g, size_t n, double *sums)
{
    doubles ww0 = {0}, ww1 = {0}, gg0 = {0}, gg1 = {0}, wg0 = {0}, wg1 = {0};
    size_t i = 0;
    for (; i + 2 * LANES <= n; i += 2 * LANES) {
        const doubles w0 = WIDE(w + i), w1 = WIDE(w + i + LANES);
        const doubles g0 = WIDE(g + i), g1 = WIDE(g + i + LANES);
        ww0 += w0 * w0, ww1 += w1 * w1;
        gg0 += g0 * g0, gg1 += g1 * g1;
        wg0 += w0 * g0, wg1 += w1 * g1;
    }
    sums[0] = total(&ww0, &ww1), sums[1] = total(&gg0, &gg1), sums[2] = total(&wg0, &wg1);
    for (; i < n; i++) {
        const double x = w[i], y = g[i];
        sums[0] += x * x, sums[1] += y * y, sums[2] += x * y;
    }
}

/* ‖g + decay * w‖ */
static double joint_norm(const REAL *w, const REAL *g, size_t n, double decay, double ww, double gg, double wg)
{
    double sum = gg + 2 * decay * wg + decay * decay * ww;
    if (!(sum > 1e-3 * gg)) { /* gradient and decay cancel, and the sum has lost its digits */
        sum = 0;
        for (size_t i = 0; i < n; i++) {
            const double d = g[i] + decay * w[i];
            sum += d * d;
        }
    }
    return sqrt(sum);
}

static struct factors lars_factors(const REAL *w, const REAL *g, size_t n, double (*sums)[3], const struct lars *rule)
{
    double ratio = 1, decay = rule->weight_decay;
    if (rule->adapt || rule->watch) {
        double ww = 0, gg = 0, wg = 0;
        for (size_t j = 0; j < parts_of(n); j++)
            ww += sums[j][0], gg += sums[j][1], wg += sums[j][2];
        const double w_norm = sqrt(ww);
        const double u_norm = rule->joint && decay != 0 ? joint_norm(w, g, n, rule->sign * decay, ww, gg, wg) : sqrt(gg);
        if (rule->skip && !isfinite(u_norm))
            return (struct factors){.skip = 1};
        if (rule->adapt)
            ratio = trust_ratio(w_norm, u_norm, &rule->trust);
        else if (!isfinite(u_norm))
            ratio = NAN;
        if (rule->raw && !(w_norm > 0 && u_norm > 0))
            decay = 0;
    }
    return (struct factors){
        .inside = (REAL)((rule->lr_inside ? rule->lr : 1) * (rule->ratio_inside ? ratio : 1)),
        .outside = (REAL)((rule->lr_inside ? 1 : rule->lr) * (rule->ratio_inside ? 1 : ratio)),
        .decay = (REAL)decay,
    };
}

/* d = inside * clamp(sign * g + decay * w, ±max_element)
   b = momentum * b + d
   w -= outside * b                     plain
   w -= outside * (d + momentum * b)    nesterov
   w -= outside * d                     without a buffer (b is NULL) */
EVERY_CPU void lars_update(REAL *restrict w, const REAL *restrict g, REAL *restrict b, size_t n,
                           const struct factors *factors, const struct lars *rule)
{
    const REAL inside = factors->inside, outside = factors->outside, decay = factors->decay;
    const REAL momentum = (REAL)rule->momentum, sign = (REAL)rule->sign, most = (REAL)rule->max_element;
    const int nesterov = rule->nesterov;
    for (size_t i = 0; i < n; i++) {
        REAL d = sign * g[i];
        if (decay != 0)
            d += decay * w[i];
        d = d > most ? most : d;
        d = d < -most ? -most : d;
        d *= inside;
        if (b) {
            b[i] = momentum * b[i] + d;
            d = nesterov ? d + momentum * b[i] : b[i];
        }
        w[i] -= outside * d;
    }
}

/* sgd_loop of steps/sgd.py. Each small tensor belongs to one thread. All threads work together on a large one, because
   two of those at a time would not stay in cache. */
int lars(size_t count, const size_t *sizes, REAL *const *ws, REAL *const *gs, REAL *const *bs, const struct lars *rule,
         int threads)
{
    if (!have_memory(count, sizes, ws) || !have_memory(count, sizes, gs) || !have_memory(count, sizes, bs))
        return 0;
    threads = threads_for(count, sizes, ws, threads);
    const int look = rule->adapt || rule->watch;
    double sums[PARTS][3];
    struct factors factors;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(dynamic, 8) nowait
        for (size_t k = 0; k < count; k++)
            if (sizes[k] <= PART) {
                double own[1][3];
                if (look)
                    lars_sums(ws[k], gs[k], sizes[k], own[0]);
                const struct factors own_factors = lars_factors(ws[k], gs[k], sizes[k], own, rule);
                if (!own_factors.skip)
                    lars_update(ws[k], gs[k], bs ? bs[k] : NULL, sizes[k], &own_factors, rule);
            }
        for (size_t k = 0; k < count; k++)
            if (sizes[k] > PART) {
                const size_t n = sizes[k], part = part_of(n), parts = parts_of(n);
#pragma omp for schedule(static)
                for (size_t j = 0; j < parts; j++)
                    if (look)
                        lars_sums(ws[k] + j * part, gs[k] + j * part, length_of(n, j), sums[j]);
#pragma omp single /* it may read the whole tensor, so no thread may change the tensor meanwhile */
                factors = lars_factors(ws[k], gs[k], n, sums, rule);
#pragma omp for schedule(static) nowait
                for (size_t j = 0; j < parts; j++)
                    if (!factors.skip)
                        lars_update(ws[k] + j * part, gs[k] + j * part, bs ? bs[k] + j * part : NULL, length_of(n, j),
                                    &factors, rule);
            }
    }
    return 1;
}

/* ----------------------------------------------------------------------------------------------------------- LAMB */

struct lamb {
    struct trust trust;
    double lr, beta1, beta2, eps;
    double decay, coupled_decay; /* added to the update; added to the gradient */
    double max_weight_norm;      /* inf: no bound */
    double clip;                 /* factor of the gradients */
    int adapt;
};

/* The direction of the step: m̂ / (√v̂ + eps), and decay * w */
INLINE REAL direction(REAL w, REAL m, REAL v, REAL m_scale, REAL v_scale, REAL eps, REAL decay)
{
    const REAL u = m * m_scale / (sqrt(v) * v_scale + eps);
    return decay != 0 ? u + decay * w : u;
}

/* The averages, and the sums of w² and of the squared direction */
EVERY_CPU void lamb_averages(const REAL *ws, const REAL *gs, REAL *ms, REAL *vs, size_t size, double m_scale_,
                             double v_scale_, const struct lamb *rule, double *sums)
{
    const REAL m_scale = (REAL)m_scale_, v_scale = (REAL)v_scale_, eps = (REAL)rule->eps, clip = (REAL)rule->clip;
    const REAL new_m = (REAL)(1 - rule->beta1), old_v = (REAL)rule->beta2, new_v = (REAL)(1 - rule->beta2);
    const REAL decay = (REAL)rule->decay, coupled = (REAL)rule->coupled_decay;
    sums[0] = sums[1] = 0;
    for (size_t start = 0; start < size; start += CHUNK) {
        const size_t n = size - start < CHUNK ? size - start : CHUNK;
        const REAL *restrict w = ws + start, *restrict g = gs + start;
        REAL *restrict m = ms + start, *restrict v = vs + start;
        REAL u[CHUNK];
        for (size_t i = 0; i < n; i++) {
            REAL x = clip * g[i];
            if (coupled != 0)
                x += coupled * w[i];
            m[i] = new_m < 0.5 ? m[i] + new_m * (x - m[i]) : x - (1 - new_m) * (x - m[i]); /* as torch.lerp */
            v[i] = old_v * v[i] + new_v * x * x;
            u[i] = direction(w[i], m[i], v[i], m_scale, v_scale, eps, decay);
        }
        sums[0] += sum_of_squares(w, n), sums[1] += sum_of_squares(u, n);
    }
}

/* w -= lr * direction; computing the direction again is as fast as storing it */
EVERY_CPU void lamb_update(REAL *restrict w, const REAL *restrict m, const REAL *restrict v, size_t n, double m_scale_,
                           double v_scale_, double lr_, const struct lamb *rule)
{
    const REAL m_scale = (REAL)m_scale_, v_scale = (REAL)v_scale_, lr = (REAL)lr_, eps = (REAL)rule->eps;
    const REAL decay = (REAL)rule->decay;
    for (size_t i = 0; i < n; i++)
        w[i] -= lr * direction(w[i], m[i], v[i], m_scale, v_scale, eps, decay);
}

static double lamb_rate(size_t n, double (*sums)[2], const struct lamb *rule)
{
    double ww = 0, uu = 0;
    for (size_t j = 0; j < parts_of(n); j++)
        ww += sums[j][0], uu += sums[j][1];
    return rule->lr * (rule->adapt ? trust_ratio(least(sqrt(ww), rule->max_weight_norm), sqrt(uu), &rule->trust) : 1);
}

/* adam_loop of steps/adam.py. m_scales are m̂ / m, and v_scales are √v̂ / √v. Threads work as in `lars`. */
int lamb(size_t count, const size_t *sizes, REAL *const *ws, REAL *const *gs, REAL *const *ms, REAL *const *vs,
         const double *m_scales, const double *v_scales, const struct lamb *rule, int threads)
{
    if (!have_memory(count, sizes, ws) || !have_memory(count, sizes, gs) || !have_memory(count, sizes, ms) ||
        !have_memory(count, sizes, vs))
        return 0;
    threads = threads_for(count, sizes, ws, threads);
    double sums[PARTS][2];
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(dynamic, 8) nowait
        for (size_t k = 0; k < count; k++)
            if (sizes[k] <= PART) {
                double own[1][2];
                lamb_averages(ws[k], gs[k], ms[k], vs[k], sizes[k], m_scales[k], v_scales[k], rule, own[0]);
                const double lr = lamb_rate(sizes[k], own, rule);
                lamb_update(ws[k], ms[k], vs[k], sizes[k], m_scales[k], v_scales[k], lr, rule);
            }
        for (size_t k = 0; k < count; k++)
            if (sizes[k] > PART) {
                const size_t n = sizes[k], part = part_of(n), parts = parts_of(n);
#pragma omp for schedule(static)
                for (size_t j = 0; j < parts; j++)
                    lamb_averages(ws[k] + j * part, gs[k] + j * part, ms[k] + j * part, vs[k] + j * part,
                                  length_of(n, j), m_scales[k], v_scales[k], rule, sums[j]);
                const double lr = lamb_rate(n, sums, rule);
#pragma omp for schedule(static)
                for (size_t j = 0; j < parts; j++)
                    lamb_update(ws[k] + j * part, ms[k] + j * part, vs[k] + j * part, length_of(n, j), m_scales[k],
                                v_scales[k], lr, rule);
            }
    }
    return 1;
}
