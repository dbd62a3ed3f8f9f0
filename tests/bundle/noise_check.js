// The noise recipe of edgegen/bundle/noise.py again, in plain JavaScript: node noise_check.js SEED STREAM COUNT
// writes COUNT little-endian float32 values on stdout.
"use strict";

const A = [3.3871328727963666080e0, 1.3314166789178437745e2, 1.9715909503065514427e3, 1.3731693765509461125e4,
  4.5921953931549871457e4, 6.7265770927008700853e4, 3.3430575583588128105e4, 2.5090809287301226727e3];
const B = [1.0, 4.2313330701600911252e1, 6.8718700749205790830e2, 5.3941960214247511077e3,
  2.1213794301586595867e4, 3.9307895800092710610e4, 2.8729085735721942674e4, 5.2264952788528545610e3];
const C = [1.42343711074968357734e0, 4.63033784615654529590e0, 5.76949722146069140550e0, 3.64784832476320460504e0,
  1.27045825245236838258e0, 2.41780725177450611770e-1, 2.27238449892691845833e-2, 7.74545014278341407640e-4];
const D = [1.0, 2.05319162663775882187e0, 1.67638483018380384940e0, 6.89767334985100004550e-1,
  1.48103976427480074590e-1, 1.51986665636164571966e-2, 5.47593808499534494600e-4, 1.05075007164441684324e-9];
const ATANH = Array.from({ length: 12 }, (_, k) => 1 / (2 * k + 1));
const SQRT_HALF = 0.7071067811865476;
const LN2 = 0.6931471805599453;

function high(a, b) { // upper 32 bits of a 32 x 32 bit product, by 16-bit halves
  const al = a & 0xffff, ah = a >>> 16, bl = b & 0xffff, bh = b >>> 16;
  const low = al * bl, mid1 = ah * bl, mid2 = al * bh;
  const carry = (low >>> 16) + (mid1 & 0xffff) + (mid2 & 0xffff);
  return (ah * bh + (mid1 >>> 16) + (mid2 >>> 16) + (carry >>> 16)) >>> 0;
}

function philox(c0, c1, c2, c3, k0, k1) {
  for (let round = 0; round < 10; round++) {
    const h0 = high(0xd2511f53, c0), l0 = Math.imul(0xd2511f53, c0) >>> 0;
    const h1 = high(0xcd9e8d57, c2), l1 = Math.imul(0xcd9e8d57, c2) >>> 0;
    c0 = (h1 ^ c1 ^ k0) >>> 0;
    c1 = l1;
    c2 = (h0 ^ c3 ^ k1) >>> 0;
    c3 = l0;
    k0 = (k0 + 0x9e3779b9) >>> 0;
    k1 = (k1 + 0xbb67ae85) >>> 0;
  }
  return [c0, c1, c2, c3];
}

function horner(c, r) {
  let y = c[c.length - 1];
  for (let k = c.length - 2; k >= 0; k--) y = y * r + c[k];
  return y;
}

function log(t) {
  let e = 0;
  while (t < 0.5) { t *= 2; e -= 1; }
  if (t < SQRT_HALF) { t *= 2; e -= 1; }
  const s = (t - 1) / (t + 1);
  return e * LN2 + (2 * s) * horner(ATANH, s * s);
}

function quantile(p) {
  const q = p - 0.5;
  if (Math.abs(q) <= 0.425) {
    const r = 0.180625 - q * q;
    return q * horner(A, r) / horner(B, r);
  }
  const r = Math.sqrt(-log(q < 0 ? p : 1 - p)) - 1.6;
  const x = horner(C, r) / horner(D, r);
  return q < 0 ? -x : x;
}

const seed = BigInt(process.argv[2]), stream = Number(process.argv[3]), count = Number(process.argv[4]);
const k0 = Number(seed & 0xffffffffn), k1 = Number(seed >> 32n);
const out = Buffer.alloc(count * 4);
for (let i = 0; i < count; i += 4) {
  const block = i / 4;
  const four = philox(block >>> 0, Math.floor(block / 2 ** 32), stream, 0, k0, k1);
  for (let j = 0; j < 4 && i + j < count; j++) out.writeFloatLE(quantile((four[j] + 0.5) * 2 ** -32), (i + j) * 4);
}
process.stdout.write(out);
