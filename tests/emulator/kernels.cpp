// The kernels, compiled as C++ with the emulator's headers.
#include "../../csrc/cuda/finish.cu"
#include "../../csrc/cuda/multiply.cu"
#include "../../csrc/cuda/scale.cu"
