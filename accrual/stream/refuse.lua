#!lua
-- Marks a pending rulebook as refused, for the owner, unless another one has taken its place.
--
-- KEYS  1 checkpoint  2 rulebooks
-- ARGV  1 nonce of the owner  2 SHA-256 of the pending rulebook  3 why
-- Returns  'owner', name of the owner  |  'refused'  |  'gone'
local checkpoint, rulebooks = unpack(KEYS)
local nonce, sha256, why = unpack(ARGV)

local owner, name = unpack(redis.call('HMGET', checkpoint, 'owner', 'owner_name'))
if owner ~= nonce then
  return { 'owner', name or '' }
end
if redis.call('HGET', rulebooks, 'pending_sha256') ~= sha256 then
  return { 'gone' }
end
redis.call('HDEL', rulebooks, 'pending', 'pending_sha256')
redis.call('HSET', rulebooks, 'refused_sha256', sha256, 'refused_reason', why)
return { 'refused' }
