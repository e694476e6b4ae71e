// The kernels, compiled as C++ with the emulator's headers.
#include "../../csrc/cuda/power.cu"
#include "../../csrc/cuda/scale.cu"
