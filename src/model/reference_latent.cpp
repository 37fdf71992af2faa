// Latent attention of the reference as DeepSeek-V2 (arXiv 2405.04434) defines it: keys and values
// of every head are written out. The engine never does that (ADR 0008).
#include "model/reference_math.h"
#include "model/rope.h"
#include "ops/reference/attention.h"

namespace lockstep::model::reference {

namespace {

struct Widths {
  std::int64_t heads, rope, nope, value, rank, key;
  explicit Widths(const ModelConfig& c)
      : heads(c.num_heads),
        rope(c.head_dim),
        nope(c.latent.nope),
        value(c.latent.value),
        rank(c.latent.kv_rank),
        key(nope + rope) {}
};

// Rotates the pairs of `x` by position * frequency, times the factor; direction -1 is the
// transpose.
void rotate(const Layer& l, double* x, std::int64_t position, double direction) {
  const std::int64_t R = l.c.head_dim;
  const bool interleaved = l.c.latent.interleaved;
  for (std::int64_t i = 0; i < R / 2; ++i) {
    const double angle = static_cast<double>(position) * l.model.inverse_frequencies[i];
    const double c = l.model.rope_factor * std::cos(angle);
    const double s = l.model.rope_factor * direction * std::sin(angle);
    double &a = x[interleaved ? 2 * i : i], &b = x[interleaved ? 2 * i + 1 : i + R / 2];
    const double a0 = a, b0 = b;
    a = a0 * c - b0 * s;
    b = b0 * c + a0 * s;
  }
}

ops::reference::AttentionShape shape_of(const Layer& l, std::int64_t T) {
  const Widths w(l.c);
  return {T, T, w.heads, w.heads, w.key, w.value, attention_scale(l.c)};
}

// The first `columns` of every row.
Matrix left(const Matrix& x, std::int64_t columns) {
  Matrix out(x.rows, columns);
  for (std::int64_t t = 0; t < x.rows; ++t) std::copy_n(x.row(t), columns, out.row(t));
  return out;
}

}  // namespace

void latent_attention(const Layer& l, ReferenceLayer& s) {
  const Widths w(l.c);
  const auto eps = static_cast<double>(kLatentEps);
  const std::int64_t T = s.h1.rows;
  if (l.c.latent.q_rank > 0) {
    s.q_raw = linear(l.at("self_attn.q_a_proj"), s.h1);
    s.q_latent = norm_rows(s.q_raw, l.at("self_attn.q_a_layernorm"), eps);
    s.q = linear(l.at("self_attn.q_b_proj"), s.q_latent);
  } else {
    s.q = linear(l.at("self_attn.q_proj"), s.h1);
  }
  s.k_raw = linear(l.at("self_attn.kv_a_proj_with_mqa"), s.h1);
  s.kv_latent = norm_rows(left(s.k_raw, w.rank), l.at("self_attn.kv_a_layernorm"), eps);
  const Matrix kv = linear(l.at("self_attn.kv_b_proj"), s.kv_latent);
  s.k = Matrix(T, w.heads * w.key), s.v = Matrix(T, w.heads * w.value);
  for (std::int64_t t = 0; t < T; ++t)
    for (std::int64_t h = 0; h < w.heads; ++h) {
      double *q = s.q.row(t) + h * w.key, *k = s.k.row(t) + h * w.key;
      const double* from = kv.row(t) + h * (w.nope + w.value);
      std::copy_n(from, w.nope, k);
      std::copy_n(from + w.nope, w.value, s.v.row(t) + h * w.value);
      std::copy_n(s.k_raw.row(t) + w.rank, w.rope, k + w.nope);
      rotate(l, q + w.nope, t, 1);
      rotate(l, k + w.nope, t, 1);
    }
  s.attention = Matrix(T, w.heads * w.value);
  ops::reference::attention(shape_of(l, T), s.q.row(0), s.k.row(0), s.v.row(0), s.attention.row(0),
                            nullptr);
}

void latent_attention_backward(const Layer& l, const ReferenceLayer& s, const Matrix& d_attention,
                               Matrix& d_h1, ReferenceParams& g) {
  const Widths w(l.c);
  const auto eps = static_cast<double>(kLatentEps);
  const std::int64_t T = s.h1.rows;
  const auto through = [&](const char* what, const Matrix& x, const Matrix& dy, Matrix& dx) {
    linear_backward(l.at(what), x, dy, dx, g.at(l.name(what)));
  };
  Matrix dq(T, s.q.columns), dk(T, s.k.columns), dv(T, s.v.columns);
  ops::reference::attention_backward(shape_of(l, T), s.q.row(0), s.k.row(0), s.v.row(0),
                                     d_attention.row(0), dq.row(0), dk.row(0), dv.row(0));
  Matrix d_kv(T, w.heads * (w.nope + w.value)), d_kv_a(T, s.k_raw.columns);
  for (std::int64_t t = 0; t < T; ++t)
    for (std::int64_t h = 0; h < w.heads; ++h) {
      double *q = dq.row(t) + h * w.key, *k = dk.row(t) + h * w.key;
      double* to = d_kv.row(t) + h * (w.nope + w.value);
      rotate(l, q + w.nope, t, -1);
      rotate(l, k + w.nope, t, -1);
      std::copy_n(k, w.nope, to);
      std::copy_n(dv.row(t) + h * w.value, w.value, to + w.nope);
      axpy(1, k + w.nope, d_kv_a.row(t) + w.rank, w.rope);
    }
  Matrix d_latent(T, w.rank), d_raw(T, w.rank);
  through("self_attn.kv_b_proj", s.kv_latent, d_kv, d_latent);
  norm_rows_backward(left(s.k_raw, w.rank), l.at("self_attn.kv_a_layernorm"), eps, d_latent, d_raw,
                     g.at(l.name("self_attn.kv_a_layernorm")));
  for (std::int64_t t = 0; t < T; ++t) std::copy_n(d_raw.row(t), w.rank, d_kv_a.row(t));
  through("self_attn.kv_a_proj_with_mqa", s.h1, d_kv_a, d_h1);
  if (l.c.latent.q_rank == 0) {
    through("self_attn.q_proj", s.h1, dq, d_h1);
    return;
  }
  Matrix d_q_latent(T, s.q_latent.columns), d_q_a(T, s.q_raw.columns);
  through("self_attn.q_b_proj", s.q_latent, dq, d_q_latent);
  norm_rows_backward(s.q_raw, l.at("self_attn.q_a_layernorm"), eps, d_q_latent, d_q_a,
                     g.at(l.name("self_attn.q_a_layernorm")));
  through("self_attn.q_a_proj", s.h1, d_q_a, d_h1);
}

}  // namespace lockstep::model::reference
