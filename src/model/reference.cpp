#include "model/reference.h"

#include <algorithm>
#include <cmath>

#include "base/error.h"
#include "model/rope.h"

namespace lockstep::model {

using Matrix = ReferenceMatrix;

namespace {

double dot(const double* a, const double* b, std::int64_t n) {
  double s[8] = {};
  std::int64_t i = 0;
  for (; i + 8 <= n; i += 8)
#pragma omp simd
    for (int j = 0; j < 8; ++j) s[j] += a[i + j] * b[i + j];
  for (; i < n; ++i) s[0] += a[i] * b[i];
  return ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]));
}

void axpy(double a, const double* x, double* y, std::int64_t n) {
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) y[i] += a * x[i];
}

// y = W x
std::vector<double> multiply(const Matrix& w, const double* x) {
  std::vector<double> y(static_cast<std::size_t>(w.rows));
  for (std::int64_t n = 0; n < w.rows; ++n) y[n] = dot(w.row(n), x, w.columns);
  return y;
}

// From dy of y = W x: dx += W^T dy, dW += dy x^T.
void multiply_backward(const Matrix& w, const double* x, const double* dy, double* dx, Matrix& dw) {
  for (std::int64_t n = 0; n < w.rows; ++n) {
    axpy(dy[n], w.row(n), dx, w.columns);
    axpy(dy[n], x, dw.row(n), w.columns);
  }
}

// Every row of x through W.
Matrix linear(const Matrix& w, const Matrix& x) {
  Matrix y(x.rows, w.rows);
  for (std::int64_t t = 0; t < x.rows; ++t) {
    const auto row = multiply(w, x.row(t));
    std::copy(row.begin(), row.end(), y.row(t));
  }
  return y;
}

void linear_backward(const Matrix& w, const Matrix& x, const Matrix& dy, Matrix& dx, Matrix& dw) {
  for (std::int64_t t = 0; t < x.rows; ++t)
    multiply_backward(w, x.row(t), dy.row(t), dx.row(t), dw);
}

// y += b in every row, where there is a bias of this name.
void add_bias(const ReferenceParams& params, const std::string& name, Matrix& y) {
  const auto found = params.find(name);
  if (found == params.end()) return;
  for (std::int64_t t = 0; t < y.rows; ++t) axpy(1.0, found->second.row(0), y.row(t), y.columns);
}

void add_bias_backward(ReferenceParams& g, const std::string& name, const Matrix& dy) {
  const auto found = g.find(name);
  if (found == g.end()) return;
  for (std::int64_t t = 0; t < dy.rows; ++t) axpy(1.0, dy.row(t), found->second.row(0), dy.columns);
}

// Cuts to [-limit, limit]; 0: not. The gradient passes what was not cut.
void clip(Matrix& y, double limit) {
  if (limit > 0)
    for (double& v : y.values) v = std::clamp(v, -limit, limit);
}

void clip_backward(const Matrix& y, double limit, Matrix& d) {
  for (std::size_t i = 0; limit > 0 && i < y.values.size(); ++i)
    if (std::fabs(y.values[i]) >= limit) d.values[i] = 0;
}

double inverse_rms(const double* x, std::int64_t n, double eps) {
  return 1.0 / std::sqrt(dot(x, x, n) / static_cast<double>(n) + eps);
}

// y_i = x_i r w_i with r = (mean x^2 + eps)^(-1/2)
void rms_norm(const double* x, const double* w, std::int64_t n, double eps, double* y) {
  const double r = inverse_rms(x, n, eps);
  for (std::int64_t i = 0; i < n; ++i) y[i] = x[i] * r * w[i];
}

// dx_j += r w_j dy_j - x_j r^3 / n * sum_i dy_i w_i x_i
void rms_norm_backward(const double* x, const double* w, std::int64_t n, double eps,
                       const double* dy, double* dx, double* dw) {
  const double r = inverse_rms(x, n, eps);
  double s = 0;
  for (std::int64_t i = 0; i < n; ++i) s += dy[i] * w[i] * x[i];
  for (std::int64_t i = 0; i < n; ++i) {
    dw[i] += dy[i] * x[i] * r;
    dx[i] += r * w[i] * dy[i] - x[i] * r * r * r * s / static_cast<double>(n);
  }
}

Matrix norm_rows(const Matrix& x, const Matrix& w, double eps) {
  Matrix y(x.rows, x.columns);
  for (std::int64_t t = 0; t < x.rows; ++t) rms_norm(x.row(t), w.row(0), x.columns, eps, y.row(t));
  return y;
}

void norm_rows_backward(const Matrix& x, const Matrix& w, double eps, const Matrix& dy, Matrix& dx,
                        Matrix& dw) {
  for (std::int64_t t = 0; t < x.rows; ++t)
    rms_norm_backward(x.row(t), w.row(0), x.columns, eps, dy.row(t), dx.row(t), dw.row(0));
}

// Rotates the pair (i, i + K/2) by position * frequency[i], times the factor; direction -1 is the
// transpose.
void rotate(double* x, std::int64_t position, const ReferenceModel& model, double direction) {
  const std::int64_t K = model.config.head_dim;
  for (std::int64_t i = 0; i < K / 2; ++i) {
    const double angle = static_cast<double>(position) * model.inverse_frequencies[i];
    const double c = model.rope_factor * std::cos(angle);
    const double s = model.rope_factor * direction * std::sin(angle);
    const double a = x[i], b = x[i + K / 2];
    x[i] = a * c - b * s;
    x[i + K / 2] = b * c + a * s;
  }
}

double sigmoid(double x) { return 1.0 / (1.0 + std::exp(-x)); }

// Names of one layer's parameters and the sizes that everything below needs.
struct Layer {
  const ReferenceModel& model;
  std::int64_t index;
  std::string prefix = fmt::format("model.layers.{}.", index);
  const ModelConfig& c = model.config;
  const ReferenceParams& params = model.params;

  std::string name(const std::string& what) const { return prefix + what + ".weight"; }
  std::string bias(const std::string& what) const { return prefix + what + ".bias"; }
  bool dense() const { return is_dense(c, index); }
  std::string router() const { return router_name(c, index); }
  std::string mlp(int expert, Projection which) const { return mlp_name(c, index, expert, which); }
  const Matrix& at(const std::string& what) const { return params.at(name(what)); }
};

// Heads of `raw`, normalised (each, or all together) and rotated.
Matrix head_norm_rope(const Layer& l, const Matrix& raw, std::int64_t heads, const char* norm) {
  const std::int64_t K = l.c.head_dim;
  Matrix out = raw;
  const std::int64_t width = l.c.qk_norm_whole ? heads * K : K;
  for (std::int64_t t = 0; t < raw.rows; ++t) {
    for (std::int64_t n = 0; l.c.qk_norm && n < heads * K; n += width)
      rms_norm(raw.row(t) + n, l.at(norm).row(0), width, static_cast<double>(l.c.rms_eps),
               out.row(t) + n);
  }
  clip(out, l.c.clip_qkv);
  for (std::int64_t t = 0; t < raw.rows; ++t) {
    for (std::int64_t h = 0; h < heads; ++h) rotate(out.row(t) + h * K, t, l.model, 1.0);
  }
  return out;
}

Matrix head_norm_rope_backward(const Layer& l, const Matrix& raw, std::int64_t heads,
                               const char* norm, Matrix d_out, ReferenceParams& g) {
  const std::int64_t K = l.c.head_dim;
  for (std::int64_t t = 0; t < raw.rows; ++t)
    for (std::int64_t h = 0; h < heads; ++h) rotate(d_out.row(t) + h * K, t, l.model, -1.0);
  if (!l.c.qk_norm) return d_out;
  Matrix d_raw(raw.rows, raw.columns), normed = raw;
  const std::int64_t width = l.c.qk_norm_whole ? heads * K : K;
  for (std::int64_t t = 0; t < raw.rows && l.c.clip_qkv > 0; ++t)
    for (std::int64_t n = 0; n < heads * K; n += width)
      rms_norm(raw.row(t) + n, l.at(norm).row(0), width, static_cast<double>(l.c.rms_eps),
               normed.row(t) + n);
  clip_backward(normed, l.c.clip_qkv, d_out);
  for (std::int64_t t = 0; t < raw.rows; ++t)
    for (std::int64_t n = 0; n < heads * K; n += width)
      rms_norm_backward(raw.row(t) + n, l.at(norm).row(0), width, static_cast<double>(l.c.rms_eps),
                        d_out.row(t) + n, d_raw.row(t) + n, g.at(l.name(norm)).row(0));
  return d_raw;
}

// probabilities: row (t * H + h) over the keys.
void attention(const Layer& l, ReferenceLayer& s) {
  const std::int64_t T = s.q.rows, H = l.c.num_heads, K = l.c.head_dim;
  const std::int64_t group = H / l.c.num_kv_heads;
  const double scale = 1.0 / std::sqrt(static_cast<double>(K));
  s.probabilities = Matrix(T * H, T);
  s.attention = Matrix(T, H * K);
  for (std::int64_t t = 0; t < T; ++t)
    for (std::int64_t h = 0; h < H; ++h) {
      double* p = s.probabilities.row(t * H + h);
      const std::int64_t kv = h / group * K;
      for (std::int64_t u = 0; u <= t; ++u)
        p[u] = scale * dot(s.q.row(t) + h * K, s.k.row(u) + kv, K);
      const double top = *std::max_element(p, p + t + 1);
      double sum = 0;
      for (std::int64_t u = 0; u <= t; ++u) sum += p[u] = std::exp(p[u] - top);
      for (std::int64_t u = 0; u <= t; ++u) {
        p[u] /= sum;
        axpy(p[u], s.v.row(u) + kv, s.attention.row(t) + h * K, K);
      }
    }
}

void attention_backward(const Layer& l, const ReferenceLayer& s, const Matrix& d_out, Matrix& dq,
                        Matrix& dk, Matrix& dv) {
  const std::int64_t T = s.q.rows, H = l.c.num_heads, K = l.c.head_dim;
  const std::int64_t group = H / l.c.num_kv_heads;
  const double scale = 1.0 / std::sqrt(static_cast<double>(K));
  for (std::int64_t t = 0; t < T; ++t)
    for (std::int64_t h = 0; h < H; ++h) {
      const double* p = s.probabilities.row(t * H + h);
      const double* d = d_out.row(t) + h * K;
      const std::int64_t kv = h / group * K;
      std::vector<double> dp(static_cast<std::size_t>(t + 1));
      double mean = 0;
      for (std::int64_t u = 0; u <= t; ++u) {
        dp[u] = dot(d, s.v.row(u) + kv, K);
        mean += p[u] * dp[u];
        axpy(p[u], d, dv.row(u) + kv, K);
      }
      for (std::int64_t u = 0; u <= t; ++u) {
        const double ds = p[u] * (dp[u] - mean) * scale;
        axpy(ds, s.k.row(u) + kv, dq.row(t) + h * K, K);
        axpy(ds, s.q.row(t) + h * K, dk.row(u) + kv, K);
      }
    }
}

void route_token(const Layer& l, ReferenceLayer& s, std::int64_t t, const int* forced) {
  const std::int64_t E = l.c.num_experts, C = l.c.router.top_k;
  const auto z = multiply(l.params.at(l.router()), s.h2.row(t));
  const double top = *std::max_element(z.begin(), z.end());
  double sum = 0;
  for (std::int64_t e = 0; e < E; ++e) sum += s.scores.row(t)[e] = std::exp(z[e] - top);
  for (std::int64_t e = 0; e < E; ++e) s.scores.row(t)[e] /= sum;
  const double* p = s.scores.row(t);

  std::vector<int> order(static_cast<std::size_t>(E));
  for (std::size_t e = 0; e < order.size(); ++e) order[e] = static_cast<int>(e);
  std::stable_sort(order.begin(), order.end(), [p](int a, int b) { return p[a] > p[b]; });
  if (forced != nullptr) std::copy(forced, forced + C, order.begin());
  double chosen = 0;
  for (std::int64_t i = 0; i < C; ++i) chosen += p[order[i]];
  for (std::int64_t i = 0; i < C; ++i) {
    s.experts.push_back(order[i]);
    s.weights.push_back(p[order[i]] / (l.c.router.normalize ? chosen : 1.0) *
                        static_cast<double>(l.c.router.scaling));
  }
}

// y += weight * the MLP of an expert (-1: the dense one) of token t; keeps what its backward needs.
void mlp(const Layer& l, ReferenceLayer& s, std::int64_t t, int expert, double weight, double* y) {
  s.gate.push_back(multiply(l.params.at(l.mlp(expert, Projection::kGate)), s.h2.row(t)));
  s.up.push_back(multiply(l.params.at(l.mlp(expert, Projection::kUp)), s.h2.row(t)));
  std::vector<double> a(s.gate.back().size());
  for (std::size_t f = 0; f < a.size(); ++f)
    a[f] = s.gate.back()[f] * sigmoid(s.gate.back()[f]) * s.up.back()[f];
  s.down.push_back(multiply(l.params.at(l.mlp(expert, Projection::kDown)), a.data()));
  axpy(weight, s.down.back().data(), y, s.h2.columns);
}

// x += experts, or the dense MLP, of h2
void mlps(const Layer& l, ReferenceLayer& s, Matrix& x) {
  const std::int64_t C = l.c.router.top_k;
  for (std::int64_t t = 0; t < x.rows; ++t) {
    if (l.dense()) mlp(l, s, t, -1, 1.0, x.row(t));
    for (std::int64_t i = 0; i < C && !l.dense(); ++i)
      mlp(l, s, t, s.experts[t * C + i], s.weights[t * C + i], x.row(t));
  }
}

// Gradient of the softmax scores' logits from those of the chosen weights.
std::vector<double> router_backward(const Layer& l, const ReferenceLayer& s, std::int64_t t,
                                    const std::vector<double>& d_weights) {
  const std::int64_t E = l.c.num_experts, C = l.c.router.top_k;
  const double* p = s.scores.row(t);
  const double scaling = static_cast<double>(l.c.router.scaling);
  double chosen = 0, mean = 0;
  for (std::int64_t i = 0; i < C; ++i) {
    chosen += p[s.experts[t * C + i]];
    mean += d_weights[i] * s.weights[t * C + i];  // of the normalised, scaled weights
  }
  std::vector<double> dp(static_cast<std::size_t>(E));
  for (std::int64_t i = 0; i < C; ++i)
    dp[s.experts[t * C + i]] +=
        l.c.router.normalize ? (d_weights[i] * scaling - mean) / chosen : d_weights[i] * scaling;
  const double inner = dot(dp.data(), p, E);
  for (std::int64_t e = 0; e < E; ++e) dp[e] = p[e] * (dp[e] - inner);
  return dp;
}

// `at`: which of the layer's calls of mlp(); dy is the gradient of its result, weighted already.
void mlp_backward(const Layer& l, const ReferenceLayer& s, std::int64_t t, int expert,
                  std::size_t at, const double* dy, double* dh2, ReferenceParams& g) {
  const auto &gate = s.gate[at], &up = s.up[at];
  std::vector<double> a(gate.size()), da(gate.size()), dgate(gate.size()), dup(gate.size());
  for (std::size_t f = 0; f < a.size(); ++f) a[f] = gate[f] * sigmoid(gate[f]) * up[f];
  const auto backward = [&](Projection which, const double* x, const double* d, double* d_x) {
    const std::string name = l.mlp(expert, which);
    multiply_backward(l.params.at(name), x, d, d_x, g.at(name));
  };
  backward(Projection::kDown, a.data(), dy, da.data());
  for (std::size_t f = 0; f < a.size(); ++f) {
    const double sg = sigmoid(gate[f]);
    dup[f] = da[f] * gate[f] * sg;
    dgate[f] = da[f] * up[f] * sg * (1 + gate[f] * (1 - sg));
  }
  backward(Projection::kGate, s.h2.row(t), dgate.data(), dh2);
  backward(Projection::kUp, s.h2.row(t), dup.data(), dh2);
}

void mlps_backward(const Layer& l, const ReferenceLayer& s, const Matrix& dx, Matrix& dh2,
                   ReferenceParams& g) {
  const std::int64_t C = l.c.router.top_k;
  for (std::int64_t t = 0; t < dx.rows; ++t) {
    if (l.dense()) {
      mlp_backward(l, s, t, -1, static_cast<std::size_t>(t), dx.row(t), dh2.row(t), g);
      continue;
    }
    std::vector<double> d_weights(static_cast<std::size_t>(C));
    for (std::int64_t i = 0; i < C; ++i) {
      const std::int64_t at = t * C + i;
      d_weights[i] = dot(dx.row(t), s.down[at].data(), dx.columns);
      std::vector<double> dy(dx.row(t), dx.row(t) + dx.columns);
      for (double& d : dy) d *= s.weights[at];
      mlp_backward(l, s, t, s.experts[at], static_cast<std::size_t>(at), dy.data(), dh2.row(t), g);
    }
    const auto dz = router_backward(l, s, t, d_weights);
    multiply_backward(l.params.at(l.router()), s.h2.row(t), dz.data(), dh2.row(t),
                      g.at(l.router()));
  }
}

// x becomes the layer's output.
ReferenceLayer forward_layer(const Layer& l, Matrix& x, const int* forced) {
  const double eps = static_cast<double>(l.c.rms_eps);
  ReferenceLayer s;
  s.x1 = x;
  s.h1 = norm_rows(x, l.at("input_layernorm"), eps);
  s.q_raw = linear(l.at("self_attn.q_proj"), s.h1);
  s.k_raw = linear(l.at("self_attn.k_proj"), s.h1);
  s.v = linear(l.at("self_attn.v_proj"), s.h1);
  add_bias(l.params, l.bias("self_attn.q_proj"), s.q_raw);
  add_bias(l.params, l.bias("self_attn.k_proj"), s.k_raw);
  add_bias(l.params, l.bias("self_attn.v_proj"), s.v);
  clip(s.v, l.c.clip_qkv);
  s.q = head_norm_rope(l, s.q_raw, l.c.num_heads, "self_attn.q_norm");
  s.k = head_norm_rope(l, s.k_raw, l.c.num_kv_heads, "self_attn.k_norm");
  attention(l, s);
  Matrix o = linear(l.at("self_attn.o_proj"), s.attention);
  add_bias(l.params, l.bias("self_attn.o_proj"), o);
  axpy(1.0, o.row(0), x.row(0), x.rows * x.columns);
  s.x2 = x;
  s.h2 = norm_rows(x, l.at("post_attention_layernorm"), eps);
  if (!l.dense()) {
    s.scores = Matrix(x.rows, l.c.num_experts);
    for (std::int64_t t = 0; t < x.rows; ++t)
      route_token(l, s, t, forced ? forced + t * l.c.router.top_k : nullptr);
  }
  mlps(l, s, x);
  return s;
}

// dx: gradient of the layer's output in, of its input out.
void backward_layer(const Layer& l, const ReferenceLayer& s, Matrix& dx, ReferenceParams& g) {
  const double eps = static_cast<double>(l.c.rms_eps);
  const auto through = [&](const char* what, const Matrix& x, const Matrix& dy, Matrix& d_x) {
    linear_backward(l.at(what), x, dy, d_x, g.at(l.name(what)));
  };
  Matrix dh2(dx.rows, dx.columns), dh1(dx.rows, dx.columns);
  mlps_backward(l, s, dx, dh2, g);
  norm_rows_backward(s.x2, l.at("post_attention_layernorm"), eps, dh2, dx,
                     g.at(l.name("post_attention_layernorm")));
  Matrix d_attention(s.attention.rows, s.attention.columns), dq(s.q.rows, s.q.columns),
      dk(s.k.rows, s.k.columns), dv(s.v.rows, s.v.columns);
  add_bias_backward(g, l.bias("self_attn.o_proj"), dx);
  through("self_attn.o_proj", s.attention, dx, d_attention);
  attention_backward(l, s, d_attention, dq, dk, dv);
  dq = head_norm_rope_backward(l, s.q_raw, l.c.num_heads, "self_attn.q_norm", std::move(dq), g);
  dk = head_norm_rope_backward(l, s.k_raw, l.c.num_kv_heads, "self_attn.k_norm", std::move(dk), g);
  clip_backward(s.v, l.c.clip_qkv, dv);
  add_bias_backward(g, l.bias("self_attn.q_proj"), dq);
  add_bias_backward(g, l.bias("self_attn.k_proj"), dk);
  add_bias_backward(g, l.bias("self_attn.v_proj"), dv);
  through("self_attn.q_proj", s.h1, dq, dh1);
  through("self_attn.k_proj", s.h1, dk, dh1);
  through("self_attn.v_proj", s.h1, dv, dh1);
  norm_rows_backward(s.x1, l.at("input_layernorm"), eps, dh1, dx, g.at(l.name("input_layernorm")));
}

const char* head_name(const ModelConfig& c) {
  return c.tie_word_embeddings ? "model.embed_tokens.weight" : "lm_head.weight";
}

}  // namespace

ReferenceParams reference_params(const Weights& weights, const tensor::TensorView& slab) {
  const tensor::TensorView source = slab ? slab : weights.slab.view();
  ReferenceParams params;
  for (std::size_t p = 0; p < weights.table.params.size(); ++p) {
    const Param& param = weights.table.params[p];
    const tensor::TensorView view = param_view(weights.table, source, static_cast<int>(p));
    for (const ParamPart& part : param.parts) {
      Matrix m(part.rows, part.columns);
      for (std::int64_t r = 0; r < part.rows; ++r)
        for (std::int64_t k = 0; k < part.columns; ++k) {
          const std::int64_t at = part_row_offset(param, part, r) + k;
          m.row(r)[k] =
              view.dtype == tensor::DType::kFp32
                  ? static_cast<double>(view.as<float>()[at])
                  : static_cast<double>(numerics::to_float(view.as<numerics::Bf16>()[at]));
        }
      params.emplace(part.hf_name, std::move(m));
    }
  }
  return params;
}

ReferenceModel reference_model(const Weights& weights) {
  const RopeFrequencies rope = rope_frequencies(weights.config);
  return {weights.config, reference_params(weights), rope.inverse, rope.factor};
}

ReferencePass reference_forward(const ReferenceModel& model,
                                const std::vector<std::int32_t>& tokens,
                                const ReferenceRouting* routing, std::int64_t first_token) {
  const auto& [c, params, frequencies, factor] = model;
  LOCKSTEP_CHECK(static_cast<std::int64_t>(frequencies.size()) == c.head_dim / 2,
                 "{} rotary frequencies for heads of {}", frequencies.size(), c.head_dim);
  LOCKSTEP_CHECK(c.router.score == ops::RouterScore::kSoftmax && c.router.groups == 1,
                 "the reference knows softmax routers without groups");
  ReferencePass pass;
  pass.tokens = tokens;
  Matrix x(static_cast<std::int64_t>(tokens.size()), c.hidden_size);
  const Matrix& embedding = params.at("model.embed_tokens.weight");
  for (std::int64_t t = 0; t < x.rows; ++t)
    std::copy_n(embedding.row(tokens[t]), x.columns, x.row(t));
  for (std::int64_t l = 0; l < c.num_layers; ++l)
    pass.layers.push_back(forward_layer({model, l}, x,
                                        routing && !is_dense(c, l)
                                            ? routing->at(l).data() + first_token * c.router.top_k
                                            : nullptr));
  pass.hidden = norm_rows(x, params.at("model.norm.weight"), static_cast<double>(c.rms_eps));
  pass.x_final = std::move(x);
  pass.logits = linear(params.at(head_name(c)), pass.hidden);
  return pass;
}

void reference_backward(const ReferenceModel& model, const ReferencePass& pass,
                        const ReferenceMatrix& d_logits, ReferenceParams& g) {
  const ModelConfig& c = model.config;
  const ReferenceParams& params = model.params;
  if (g.empty())
    for (const auto& [name, w] : params) g.emplace(name, Matrix(w.rows, w.columns));
  Matrix d_hidden(pass.hidden.rows, c.hidden_size), dx(pass.hidden.rows, c.hidden_size);
  linear_backward(params.at(head_name(c)), pass.hidden, d_logits, d_hidden, g.at(head_name(c)));
  norm_rows_backward(pass.x_final, params.at("model.norm.weight"), static_cast<double>(c.rms_eps),
                     d_hidden, dx, g.at("model.norm.weight"));
  for (std::size_t l = pass.layers.size(); l-- > 0;)
    backward_layer({model, static_cast<std::int64_t>(l)}, pass.layers[l], dx, g);
  for (std::int64_t t = 0; t < dx.rows; ++t)
    axpy(1.0, dx.row(t), g.at("model.embed_tokens.weight").row(pass.tokens[t]), dx.columns);
}

double reference_loss(const ReferenceModel& model,
                      const std::vector<std::vector<std::int32_t>>& sequences,
                      ReferenceParams* gradients, const ReferenceRouting* routing) {
  double count = 0, loss = 0;
  for (const auto& s : sequences) count += static_cast<double>(s.size()) - 1;
  std::int64_t first = 0;
  for (const auto& tokens : sequences) {
    const ReferencePass pass = reference_forward(model, tokens, routing, first);
    Matrix d(pass.logits.rows, pass.logits.columns);
    for (std::int64_t t = 0; t + 1 < d.rows; ++t) {
      const double* z = pass.logits.row(t);
      const double top = *std::max_element(z, z + d.columns);
      double sum = 0;
      for (std::int64_t v = 0; v < d.columns; ++v) sum += std::exp(z[v] - top);
      loss += (top + std::log(sum) - z[tokens[t + 1]]) / count;
      for (std::int64_t v = 0; v < d.columns; ++v) d.row(t)[v] = std::exp(z[v] - top) / sum / count;
      d.row(t)[tokens[t + 1]] -= 1.0 / count;
    }
    if (gradients != nullptr) reference_backward(model, pass, d, *gradients);
    first += static_cast<std::int64_t>(tokens.size());
  }
  return loss;
}

void reference_adamw(ReferenceAdamw& s, const ReferenceParams& gradients, ReferenceParams& params) {
  ++s.step;
  const double c1 = 1 - std::pow(s.beta1, static_cast<double>(s.step));
  const double c2 = 1 - std::pow(s.beta2, static_cast<double>(s.step));
  for (auto& [name, w] : params) {
    Matrix &m = s.m[name], &v = s.v[name];
    if (m.values.empty()) m = v = Matrix(w.rows, w.columns);
    const Matrix& g = gradients.at(name);
    for (std::size_t i = 0; i < w.values.size(); ++i) {
      m.values[i] = s.beta1 * m.values[i] + (1 - s.beta1) * g.values[i];
      v.values[i] = s.beta2 * v.values[i] + (1 - s.beta2) * g.values[i] * g.values[i];
      w.values[i] -= s.lr * (s.weight_decay * w.values[i] +
                             m.values[i] / c1 / (std::sqrt(v.values[i] / c2) + s.eps));
    }
  }
}

std::vector<std::int32_t> reference_greedy(const ReferenceModel& model,
                                           std::vector<std::int32_t> tokens, int count,
                                           std::vector<double>* gaps) {
  for (int i = 0; i < count; ++i) {
    const ReferencePass pass = reference_forward(model, tokens);
    const double* z = pass.logits.row(pass.logits.rows - 1);
    const double* best = std::max_element(z, z + pass.logits.columns);
    double second = -INFINITY;
    for (const double* other = z; other < z + pass.logits.columns; ++other)
      if (other != best) second = std::max(second, *other);
    if (gaps != nullptr) gaps->push_back(*best - second);
    tokens.push_back(static_cast<std::int32_t>(best - z));
  }
  return tokens;
}

}  // namespace lockstep::model
