// Loops of the update. Included once for each CPU target, with PYFT_LOOPS, a namespace, and PYFT_LOOPS_TARGET, an
// attribute, defined; there is no include guard. A rule works on fp32 numbers: those of the tensors themselves where
// they are fp32, else copies of one block, which stay in the L1 cache.

namespace pyft::PYFT_LOOPS {

// Rules. With kCoded the moments come from `coded`, codes of 8 bits of one block, else from the arrays that they are
// written to. Decoding and the search for the largest hide behind the divisions in the same loop.
template <bool kCoded, bool kCoupled, bool kAmsgrad>
PYFT_LOOPS_TARGET void adam_loop(float* __restrict__ p, const float* __restrict__ g, Coded& coded,
                                 float* __restrict__ m, float* __restrict__ v, float* __restrict__ max_v,
                                 int32_t length, float scale, const RuleStep& step) {
  const AdamStep h = step.adam;
  const Coded c = coded;
  uint32_t largest[kMoments] = {};
  for (int32_t i = 0; i < length; ++i) {
    float exp_avg = kCoded ? c.signed_at(0, i) : m[i];
    float exp_avg_sq = kCoded ? c.unsigned_at(1, i) : v[i];
    float max_exp_avg_sq = !kAmsgrad ? 0.0f : kCoded ? c.unsigned_at(2, i) : max_v[i];
    adam_element<kCoupled, kAmsgrad>(p[i], g[i] * scale, exp_avg, exp_avg_sq, max_exp_avg_sq, h);
    m[i] = exp_avg;
    v[i] = exp_avg_sq;
    if (kAmsgrad) {
      max_v[i] = max_exp_avg_sq;
    }
    if (kCoded) {
      largest[0] = larger_size(largest[0], exp_avg);
      largest[1] = larger_size(largest[1], exp_avg_sq);
      largest[2] = larger_size(largest[2], max_exp_avg_sq);
    }
  }
  std::copy(largest, largest + kMoments, coded.largest);
}

template <bool kCoded, SgdKind kKind>
PYFT_LOOPS_TARGET void sgd_loop(float* __restrict__ p, const float* __restrict__ g, Coded& coded,
                                float* __restrict__ buffer, float*, float*, int32_t length, float scale,
                                const RuleStep& step) {
  const SgdStep h = step.sgd;
  const Coded c = coded;
  constexpr bool kBuffer = kKind != SgdKind::plain;
  uint32_t largest = 0;
  for (int32_t i = 0; i < length; ++i) {
    float velocity = !kBuffer ? 0.0f : kCoded ? c.signed_at(0, i) : buffer[i];
    sgd_element<kKind>(p[i], g[i] * scale, velocity, h);
    if (kBuffer) {
      buffer[i] = velocity;
    }
    if (kCoded) {
      largest = larger_size(largest, velocity);
    }
  }
  coded.largest[0] = largest;
}

template <bool kCoded, bool kCentered, bool kMomentum>
PYFT_LOOPS_TARGET void rmsprop_loop(float* __restrict__ p, const float* __restrict__ g, Coded& coded,
                                    float* __restrict__ square_avg, float* __restrict__ buffer,
                                    float* __restrict__ grad_avg, int32_t length, float scale, const RuleStep& step) {
  const RmspropStep h = step.rmsprop;
  const Coded c = coded;
  uint32_t largest[kMoments] = {};
  for (int32_t i = 0; i < length; ++i) {
    float v = kCoded ? c.unsigned_at(0, i) : square_avg[i];
    float velocity = !kMomentum ? 0.0f : kCoded ? c.signed_at(1, i) : buffer[i];
    float mean = !kCentered ? 0.0f : kCoded ? c.signed_at(2, i) : grad_avg[i];
    rmsprop_element<kCentered, kMomentum>(p[i], g[i] * scale, v, velocity, mean, h);
    square_avg[i] = v;
    if (kMomentum) {
      buffer[i] = velocity;
    }
    if (kCentered) {
      grad_avg[i] = mean;
    }
    if (kCoded) {
      largest[0] = larger_size(largest[0], v);
      largest[1] = larger_size(largest[1], velocity);
      largest[2] = larger_size(largest[2], mean);
    }
  }
  std::copy(largest, largest + kMoments, coded.largest);
}

template <bool kCoded>
PYFT_LOOPS_TARGET void adagrad_loop(float* __restrict__ p, const float* __restrict__ g, Coded& coded,
                                    float* __restrict__ sum, float*, float*, int32_t length, float scale,
                                    const RuleStep& step) {
  const AdagradStep h = step.adagrad;
  const Coded c = coded;
  uint32_t largest = 0;
  for (int32_t i = 0; i < length; ++i) {
    float total = kCoded ? c.unsigned_at(0, i) : sum[i];
    adagrad_element(p[i], g[i] * scale, total, h);
    sum[i] = total;
    if (kCoded) {
      largest = larger_size(largest, total);
    }
  }
  coded.largest[0] = largest;
}

template <bool kCoded>
PYFT_LOOPS_TARGET void lion_loop(float* __restrict__ p, const float* __restrict__ g, Coded& coded,
                                 float* __restrict__ m, float*, float*, int32_t length, float scale,
                                 const RuleStep& step) {
  const LionStep h = step.lion;
  const Coded c = coded;
  uint32_t largest = 0;
  for (int32_t i = 0; i < length; ++i) {
    float exp_avg = kCoded ? c.signed_at(0, i) : m[i];
    lion_element(p[i], g[i] * scale, exp_avg, h);
    m[i] = exp_avg;
    if (kCoded) {
      largest = larger_size(largest, exp_avg);
    }
  }
  coded.largest[0] = largest;
}

// In the order of Rule.
template <bool kCoded>
constexpr RuleLoop kRuleLoops[kRules] = {
    adam_loop<kCoded, false, false>,
    adam_loop<kCoded, false, true>,
    adam_loop<kCoded, true, false>,
    adam_loop<kCoded, true, true>,
    sgd_loop<kCoded, SgdKind::plain>,
    sgd_loop<kCoded, SgdKind::momentum>,
    sgd_loop<kCoded, SgdKind::nesterov>,
    rmsprop_loop<kCoded, false, false>,
    rmsprop_loop<kCoded, true, false>,
    rmsprop_loop<kCoded, false, true>,
    rmsprop_loop<kCoded, true, true>,
    adagrad_loop<kCoded>,
    lion_loop<kCoded>,
};

template <class T>
PYFT_LOOPS_TARGET void widen(const T* __restrict__ from, float* __restrict__ to, int64_t length) {
  for (int64_t i = 0; i < length; ++i) {
    to[i] = to_fp32(from[i]);
  }
}

PYFT_LOOPS_TARGET inline void widen(const FloatData& from, int64_t begin, float* to, int64_t length) {
  switch (from.format) {
    case FloatFormat::fp32:
      return widen(static_cast<const float*>(from.data) + begin, to, length);
    case FloatFormat::bf16:
      return widen(static_cast<const Bf16*>(from.data) + begin, to, length);
    case FloatFormat::fp16:
      return widen(static_cast<const Fp16*>(from.data) + begin, to, length);
  }
}

PYFT_LOOPS_TARGET inline void fill_random(uint32_t key, int64_t begin, uint32_t* random, int64_t length) {
  const uint32_t of_place = key_of_place(key, begin), low = static_cast<uint32_t>(begin);
  for (int64_t i = 0; i < length; ++i) {
    random[i] = random_bits(of_place, low + static_cast<uint32_t>(i));
  }
}

// The parameter in fp32: the tensor itself, or its value in `buffer`.
PYFT_LOOPS_TARGET inline float* load_param(const TensorUpdate& t, int64_t begin, float* __restrict__ buffer,
                                           int64_t length) {
  const Bf16* bf16 = static_cast<const Bf16*>(t.param) + begin;
  switch (t.weights) {
    case WeightFormat::fp32:
      return static_cast<float*>(t.param) + begin;
    case WeightFormat::fp16:
      widen(static_cast<const Fp16*>(t.param) + begin, buffer, length);
      break;
    case WeightFormat::bf16:
    case WeightFormat::bf16_stochastic:
      widen(bf16, buffer, length);
      break;
    case WeightFormat::bf16_split32: {
      const int16_t* low = static_cast<const int16_t*>(t.extra) + begin;
      for (int64_t i = 0; i < length; ++i) {
        buffer[i] = join(bf16[i], low[i]);
      }
      break;
    }
    case WeightFormat::bf16_kahan: {
      const Bf16* compensation = static_cast<const Bf16*>(t.extra) + begin;
      for (int64_t i = 0; i < length; ++i) {
        buffer[i] = to_fp32(bf16[i]) + to_fp32(compensation[i]);
      }
      break;
    }
  }
  return buffer;
}

PYFT_LOOPS_TARGET inline void store_param(const TensorUpdate& t, int64_t begin, const float* __restrict__ value,
                                          int64_t length) {
  Bf16* __restrict__ bf16 = static_cast<Bf16*>(t.param) + begin;
  switch (t.weights) {
    case WeightFormat::fp32:
      return;
    case WeightFormat::fp16: {
      Fp16* __restrict__ fp16 = static_cast<Fp16*>(t.param) + begin;
      for (int64_t i = 0; i < length; ++i) {
        fp16[i].bits = to_fp16(value[i]).bits;
      }
      return;
    }
    case WeightFormat::bf16:
      for (int64_t i = 0; i < length; ++i) {
        bf16[i] = to_bf16(value[i]);
      }
      return;
    case WeightFormat::bf16_stochastic: {
      uint32_t random[kBlock];
      fill_random(~t.key, begin, random, length);
      for (int64_t i = 0; i < length; ++i) {
        bf16[i] = to_bf16_stochastic(value[i], random[i] >> 16);
      }
      return;
    }
    case WeightFormat::bf16_split32: {
      int16_t* __restrict__ low = static_cast<int16_t*>(t.extra) + begin;
      for (int64_t i = 0; i < length; ++i) {
        const uint16_t high = split_high(value[i]);
        bf16[i].bits = high;
        low[i] = split_low(value[i], high);
      }
      return;
    }
    case WeightFormat::bf16_kahan: {
      Bf16* __restrict__ compensation = static_cast<Bf16*>(t.extra) + begin;
      for (int64_t i = 0; i < length; ++i) {
        const uint16_t rounded = to_bf16(value[i]).bits;
        bf16[i].bits = rounded;
        compensation[i].bits = to_bf16(value[i] - to_fp32(Bf16{rounded})).bits;
      }
      return;
    }
  }
}

// Where the rule reads and writes a moment: the tensor itself, or `buffer` with its value, or without if it is coded.
PYFT_LOOPS_TARGET inline float* load_moment(const Moment& moment, int64_t begin, float* __restrict__ buffer,
                                            int64_t length) {
  switch (moment.format) {
    case MomentFormat::none:
      return nullptr;
    case MomentFormat::fp32:
      return static_cast<float*>(moment.data) + begin;
    case MomentFormat::bf16:
      widen(static_cast<const Bf16*>(moment.data) + begin, buffer, length);
      break;
    case MomentFormat::int8:
      break;
  }
  return buffer;
}

template <bool kSigned>
PYFT_LOOPS_TARGET void encode_block(int8_t* __restrict__ codes, const float* __restrict__ value, uint32_t lowest,
                                    uint32_t random, int32_t length) {
  for (int32_t i = 0; i < length; ++i) {
    codes[i] = kSigned ? encode_signed(value[i], lowest, random)
                       : static_cast<int8_t>(encode_unsigned(value[i], lowest, random));
    random += kGolden;
  }
}

PYFT_LOOPS_TARGET inline void store_int8(const Moment& moment, int64_t begin, float* value, uint32_t largest,
                                         uint32_t random, int32_t length) {
  if (largest > kInfinityBits) {
    // Only this NaN has a code.
    for (int32_t i = 0; i < length; ++i) {
      value[i] = is_nan_bits(bits_of(value[i])) ? float_of(0x7fc00000u) : value[i];
    }
  }
  const float scale = block_scale(largest);
  moment.scale[begin / kBlock] = scale;
  int8_t* codes = static_cast<int8_t*>(moment.data) + begin;
  if (moment.is_signed) {
    encode_block<true>(codes, value, lowest_signed(scale), random, length);
  } else {
    encode_block<false>(codes, value, lowest_unsigned(scale), random, length);
  }
}

PYFT_LOOPS_TARGET inline void store_bf16(Bf16* __restrict__ to, const float* __restrict__ value, uint32_t random,
                                         int32_t length) {
  for (int32_t i = 0; i < length; ++i) {
    to[i] = to_bf16_stochastic(value[i], random >> 16);
    random += kGolden;
  }
}

// Rounded with random bits of the tensor, the step, the moment and the block.
PYFT_LOOPS_TARGET inline void store_moment(const TensorUpdate& t, int moment, int64_t begin, float* value,
                                           uint32_t largest, int32_t length) {
  const Moment& to = t.moments[moment];
  const uint32_t random = random_bits(t.key + static_cast<uint32_t>(moment), static_cast<uint32_t>(begin / kBlock));
  if (to.format == MomentFormat::int8) {
    store_int8(to, begin, value, largest, random, length);
  } else if (to.format == MomentFormat::bf16) {
    store_bf16(static_cast<Bf16*>(to.data) + begin, value, random, length);
  }
}

PYFT_LOOPS_TARGET inline void scale_rows(const TensorUpdate& t, int64_t begin, float* __restrict__ g, int64_t length) {
  for (int64_t i = 0; i < length;) {
    const int64_t row = (begin + i) / t.row_length;
    const int64_t left = (row + 1) * t.row_length - begin - i;
    const int64_t end = i + (left < length - i ? left : length - i);
    const float factor = t.row_factors[row];
    for (; i < end; ++i) {
      g[i] *= factor;
    }
  }
}

// The gradient in fp32, clamped and clipped by rows: the tensor itself, or its value in `buffer`.
PYFT_LOOPS_TARGET inline const float* load_grad(const TensorUpdate& t, int64_t begin, float* __restrict__ buffer,
                                                int64_t length) {
  const bool clamped = t.clip_value < INFINITY;
  if (t.grad.format == FloatFormat::fp32 && !clamped && t.row_factors == nullptr && t.init_pull == 0.0f) {
    return static_cast<const float*>(t.grad.data) + begin;
  }
  widen(t.grad, begin, buffer, length);
  if (clamped) {
    const float limit = t.clip_value;
    for (int64_t i = 0; i < length; ++i) {
      const float low = buffer[i] < -limit ? -limit : buffer[i];
      buffer[i] = low > limit ? limit : low;
    }
  }
  if (t.row_factors != nullptr) {
    scale_rows(t, begin, buffer, length);
  }
  return buffer;
}

// The pull toward the first value, as the parameter is before the rule: what is to be added to a gradient that is
// scaled already, or taken from the parameter after the rule.
PYFT_LOOPS_TARGET inline void pull_to_init(const TensorUpdate& t, int64_t begin, const float* __restrict__ p,
                                           float* __restrict__ pull, int64_t length) {
  widen(t.init, begin, pull, length);
  const float factor = t.init_pull;
  for (int64_t i = 0; i < length; ++i) {
    pull[i] = factor * (p[i] - pull[i]);
  }
}

// At most kBlock elements, of any format.
PYFT_LOOPS_TARGET inline void update_block(const TensorUpdate& t, int64_t begin, int64_t length) {
  alignas(64) float p_buffer[kBlock], g_buffer[kBlock], moment_buffer[kMoments][kBlock];
  float* p = load_param(t, begin, p_buffer, length);
  const float* g = load_grad(t, begin, g_buffer, length);
  float* moments[kMoments];
  Coded coded{};
  bool is_coded = false;
  for (int k = 0; k < kMoments; ++k) {
    const Moment& moment = t.moments[k];
    moments[k] = load_moment(moment, begin, moment_buffer[k], length);
    if (moment.format == MomentFormat::int8) {
      is_coded = true;
      coded.codes[k] = static_cast<const int8_t*>(moment.data) + begin;
      const float scale = moment.scale[begin / kBlock];
      coded.lowest[k] = moment.is_signed ? lowest_signed(scale) : lowest_unsigned(scale);
    }
  }
  const bool decoupled = kRuleInfo[static_cast<int>(t.rule)].decoupled_decay;
  float scale = t.grad_scale;
  alignas(64) float pull[kBlock];
  if (t.init_pull != 0.0f) {
    pull_to_init(t, begin, p, pull, length);
    if (!decoupled) {
      for (int64_t i = 0; i < length; ++i) {
        g_buffer[i] = g_buffer[i] * scale + pull[i];
      }
      scale = 1.0f;
    }
  }
  const RuleLoop rule =
      is_coded ? kRuleLoops<true>[static_cast<int>(t.rule)] : kRuleLoops<false>[static_cast<int>(t.rule)];
  rule(p, g, coded, moments[0], moments[1], moments[2], length, scale, t.step);
  if (t.init_pull != 0.0f && decoupled) {
    for (int64_t i = 0; i < length; ++i) {
      p[i] -= pull[i];
    }
  }
  store_param(t, begin, p, length);
  for (int k = 0; k < kMoments; ++k) {
    if (moments[k] == moment_buffer[k]) {
      store_moment(t, k, begin, moments[k], coded.largest[k], static_cast<int32_t>(length));
    }
  }
}

// Any number of elements, all in fp32, with nothing to be done to the gradient but to scale it.
PYFT_LOOPS_TARGET inline void update_plain(const TensorUpdate& t, int64_t begin, int64_t length) {
  const auto at = [begin](void* data) { return data == nullptr ? nullptr : static_cast<float*>(data) + begin; };
  Coded none;
  kRuleLoops<false>[static_cast<int>(t.rule)](at(t.param), static_cast<const float*>(t.grad.data) + begin, none,
                                              at(t.moments[0].data), at(t.moments[1].data), at(t.moments[2].data),
                                              static_cast<int32_t>(length), t.grad_scale, t.step);
}

PYFT_LOOPS_TARGET inline void update_range(const TensorUpdate& t, bool plain, int64_t begin, int64_t length) {
  if (plain) {
    return update_plain(t, begin, length);
  }
  for (int64_t i = 0; i < length; i += kBlock) {
    update_block(t, begin + i, length - i < kBlock ? length - i : kBlock);
  }
}

// Two places of a long chunk are worked on in turn: twice as many cache lines are under way, which one core needs to
// keep the memory busy.
PYFT_LOOPS_TARGET void update_chunk(const TensorUpdate& t, int64_t offset, int64_t length) {
  const bool plain = is_plain(t);
  if (length < kTwoStreams) {
    return update_range(t, plain, offset, length);
  }
  const int64_t second = length / 2 / kBlock * kBlock + kSkew;
  int64_t i = 0;
  for (; i + kBlock <= length - second; i += kBlock) {
    update_range(t, plain, offset + i, kBlock);
    update_range(t, plain, offset + second + i, kBlock);
  }
  update_range(t, plain, offset + i, second - i);
  update_range(t, plain, offset + second + i, length - second - i);
}

}  // namespace pyft::PYFT_LOOPS

#undef PYFT_LOOPS
#undef PYFT_LOOPS_TARGET
