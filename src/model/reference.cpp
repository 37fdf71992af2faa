#include "model/reference.h"

#include <algorithm>
#include <cmath>

#include "base/error.h"
#include "model/reference_math.h"
#include "model/rope.h"
#include "ops/reference/router.h"

namespace lockstep::model {

using namespace reference;

namespace {

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
  const auto z = multiply(l.params.at(l.router()), s.h2.row(t));
  std::copy(z.begin(), z.end(), s.router_logits.row(t));
  const auto& bias = l.model.router_bias;
  ops::reference::Routed routed = ops::reference::router(
      z, bias.empty() ? std::vector<double>() : bias[static_cast<std::size_t>(l.index)],
      l.c.router);
  if (forced != nullptr) {
    routed.experts.assign(forced, forced + l.c.router.top_k);
    routed.weights = ops::reference::router_weights(routed.scores, routed.experts, l.c.router);
  }
  std::copy(routed.scores.begin(), routed.scores.end(), s.scores.row(t));
  s.experts.insert(s.experts.end(), routed.experts.begin(), routed.experts.end());
  s.weights.insert(s.weights.end(), routed.weights.begin(), routed.weights.end());
}

// The MLP of token t that `expert` (or kDenseMlp, kSharedExperts) names; keeps what its backward
// needs.
std::vector<double> mlp(const Layer& l, const ReferenceLayer& s, std::int64_t t,
                        std::int64_t expert, std::vector<std::vector<double>>& gate,
                        std::vector<std::vector<double>>& up) {
  gate.push_back(multiply(l.params.at(l.mlp(expert, Projection::kGate)), s.h2.row(t)));
  up.push_back(multiply(l.params.at(l.mlp(expert, Projection::kUp)), s.h2.row(t)));
  std::vector<double> a(gate.back().size());
  for (std::size_t f = 0; f < a.size(); ++f)
    a[f] = gate.back()[f] * sigmoid(gate.back()[f]) * up.back()[f];
  return multiply(l.params.at(l.mlp(expert, Projection::kDown)), a.data());
}

// x += experts, or the dense MLP, of h2
void mlps(const Layer& l, ReferenceLayer& s, Matrix& x) {
  const std::int64_t C = l.c.router.top_k;
  for (std::int64_t t = 0; t < x.rows; ++t) {
    if (l.dense()) {
      axpy(1, mlp(l, s, t, kDenseMlp, s.gate, s.up).data(), x.row(t), x.columns);
      continue;
    }
    for (std::int64_t i = 0; i < C; ++i) {
      s.down.push_back(mlp(l, s, t, s.experts[t * C + i], s.gate, s.up));
      axpy(s.weights[t * C + i], s.down.back().data(), x.row(t), x.columns);
    }
    if (l.c.num_shared_experts > 0)
      axpy(1, mlp(l, s, t, kSharedExperts, s.shared_gate, s.shared_up).data(), x.row(t), x.columns);
  }
}

// dy is the gradient of the MLP's result, weighted already.
void mlp_backward(const Layer& l, const double* h2, std::int64_t expert,
                  const std::vector<double>& gate, const std::vector<double>& up, const double* dy,
                  double* dh2, ReferenceParams& g) {
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
  backward(Projection::kGate, h2, dgate.data(), dh2);
  backward(Projection::kUp, h2, dup.data(), dh2);
}

void mlps_backward(const Layer& l, const ReferenceLayer& s, const Matrix& dx, Matrix& dh2,
                   ReferenceParams& g) {
  const std::int64_t C = l.c.router.top_k;
  for (std::int64_t t = 0; t < dx.rows; ++t) {
    const double* h2 = s.h2.row(t);
    if (l.dense()) {
      mlp_backward(l, h2, kDenseMlp, s.gate[t], s.up[t], dx.row(t), dh2.row(t), g);
      continue;
    }
    std::vector<double> d_weights(static_cast<std::size_t>(C));
    for (std::int64_t i = 0; i < C; ++i) {
      const std::int64_t at = t * C + i;
      d_weights[i] = dot(dx.row(t), s.down[at].data(), dx.columns);
      std::vector<double> dy(dx.row(t), dx.row(t) + dx.columns);
      for (double& d : dy) d *= s.weights[at];
      mlp_backward(l, h2, s.experts[at], s.gate[at], s.up[at], dy.data(), dh2.row(t), g);
    }
    if (l.c.num_shared_experts > 0)
      mlp_backward(l, h2, kSharedExperts, s.shared_gate[t], s.shared_up[t], dx.row(t), dh2.row(t),
                   g);
    const double* z = s.router_logits.row(t);
    const int* experts = s.experts.data() + t * C;
    const auto dz = ops::reference::router_backward(
        {z, z + l.c.num_experts}, {experts, experts + C}, d_weights, {}, l.c.router);
    multiply_backward(l.params.at(l.router()), h2, dz.data(), dh2.row(t), g.at(l.router()));
  }
}

void grouped_attention(const Layer& l, ReferenceLayer& s) {
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
}

void grouped_attention_backward(const Layer& l, const ReferenceLayer& s, const Matrix& d_attention,
                                Matrix& dh1, ReferenceParams& g) {
  const auto through = [&](const char* what, const Matrix& x, const Matrix& dy, Matrix& d_x) {
    linear_backward(l.at(what), x, dy, d_x, g.at(l.name(what)));
  };
  Matrix dq(s.q.rows, s.q.columns), dk(s.k.rows, s.k.columns), dv(s.v.rows, s.v.columns);
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
}

// x becomes the layer's output.
ReferenceLayer forward_layer(const Layer& l, Matrix& x, const int* forced) {
  const double eps = static_cast<double>(l.c.rms_eps);
  ReferenceLayer s;
  s.x1 = x;
  s.h1 = norm_rows(x, l.at("input_layernorm"), eps);
  is_latent(l.c) ? latent_attention(l, s) : grouped_attention(l, s);
  Matrix o = linear(l.at("self_attn.o_proj"), s.attention);
  add_bias(l.params, l.bias("self_attn.o_proj"), o);
  axpy(1.0, o.row(0), x.row(0), x.rows * x.columns);
  s.x2 = x;
  s.h2 = norm_rows(x, l.at("post_attention_layernorm"), eps);
  if (!l.dense()) {
    s.scores = s.router_logits = Matrix(x.rows, l.c.num_experts);
    for (std::int64_t t = 0; t < x.rows; ++t)
      route_token(l, s, t, forced ? forced + t * l.c.router.top_k : nullptr);
  }
  mlps(l, s, x);
  return s;
}

// dx: gradient of the layer's output in, of its input out.
void backward_layer(const Layer& l, const ReferenceLayer& s, Matrix& dx, ReferenceParams& g) {
  const double eps = static_cast<double>(l.c.rms_eps);
  Matrix dh2(dx.rows, dx.columns), dh1(dx.rows, dx.columns);
  mlps_backward(l, s, dx, dh2, g);
  norm_rows_backward(s.x2, l.at("post_attention_layernorm"), eps, dh2, dx,
                     g.at(l.name("post_attention_layernorm")));
  Matrix d_attention(s.attention.rows, s.attention.columns);
  add_bias_backward(g, l.bias("self_attn.o_proj"), dx);
  linear_backward(l.at("self_attn.o_proj"), s.attention, dx, d_attention,
                  g.at(l.name("self_attn.o_proj")));
  is_latent(l.c) ? latent_attention_backward(l, s, d_attention, dh1, g)
                 : grouped_attention_backward(l, s, d_attention, dh1, g);
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
  ReferenceModel model{weights.config, reference_params(weights), rope.inverse, rope.factor};
  const tensor::TensorView bias_LE = weights.router_bias.view();
  const std::int64_t L = bias_LE.dim(0), E = weights.config.num_experts;
  for (std::int64_t l = 0; l < L && E > 0; ++l) {
    const float* bias_E = bias_LE.as<float>() + l * E;
    model.router_bias.emplace_back(bias_E, bias_E + E);
  }
  return model;
}

ReferencePass reference_forward(const ReferenceModel& model,
                                const std::vector<std::int32_t>& tokens,
                                const ReferenceRouting* routing, std::int64_t first_token) {
  const auto& [c, params, frequencies, factor, bias] = model;
  LOCKSTEP_CHECK(static_cast<std::int64_t>(frequencies.size()) == c.head_dim / 2,
                 "{} rotary frequencies for heads of {}", frequencies.size(), c.head_dim);
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
