// The kernels, compiled as C++ with the emulator's headers.
#include "../../csrc/cuda/backward.cu"
#include "../../csrc/cuda/finish.cu"
#include "../../csrc/cuda/mean_bias.cu"
#include "../../csrc/cuda/multiply.cu"
#include "../../csrc/cuda/patch_mean.cu"
#include "../../csrc/cuda/rest.cu"
#include "../../csrc/cuda/scale.cu"
